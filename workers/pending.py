"""What a group has been asked and has not finished: plans until every rank acknowledged them, copies until every rank answered."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.step import CopyResult, StepPlan, StepResult


class OutOfTurn(Exception):
    """A rank answered something that is not its next answer."""


@dataclass(slots=True)
class _Step:
    sequence: int
    num_tokens: int
    missing: set[int]  # ranks
    result: StepResult | None = None


class StepsInFlight:
    """Plans in the order they were sent. Only the oldest has a deadline, since the others wait for it on every rank."""

    def __init__(self, num_ranks: int, base_s: float, token_s: float) -> None:
        self._ranks = range(num_ranks)
        self._base_s = base_s
        self._token_s = token_s
        self._steps: deque[_Step] = deque()
        self.deadline_s = math.inf  # of the oldest, CLOCK_MONOTONIC

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, plan: StepPlan, now_s: float) -> None:
        num_tokens = sum([row.num_query_tokens for row in plan.rows])
        self._steps.append(_Step(plan.sequence, num_tokens, set(self._ranks)))
        if len(self._steps) == 1:
            self._start_clock(now_s)

    def answer(self, rank: int, sequence: int, result: StepResult | None, now_s: float) -> StepResult | None:
        """Notes that `rank` finished a step; the group's result when it was the last one. OutOfTurn for any but the rank's next step."""
        for step in self._steps:
            if rank in step.missing:
                break
        else:
            raise OutOfTurn(f"acknowledged step {sequence}, but none is in flight")
        if sequence != step.sequence:
            raise OutOfTurn(f"acknowledged step {sequence} where {step.sequence} is next")
        step.missing.remove(rank)
        step.result = result or step.result
        if step.missing:
            return None
        self._steps.popleft()  # ranks answer in order, so a later step is never finished before this one
        self._start_clock(now_s)
        return step.result

    def _start_clock(self, now_s: float) -> None:
        self.deadline_s = now_s + self._limit_s(self._steps[0]) if self._steps else math.inf

    def _limit_s(self, step: _Step) -> float:
        return self._base_s + self._token_s * step.num_tokens

    def overdue(self) -> tuple[set[int], str]:
        """The ranks that the oldest step waits for, and what they have not done."""
        step = self._steps[0]
        return step.missing, f"not finished step {step.sequence} ({step.num_tokens} tokens) within {self._limit_s(step):.3g} s"


@dataclass(slots=True)
class _Copy:
    not_before_s: float  # until then a rank may leave it waiting
    answers: dict[int, CopyResult] = field(default_factory=dict)
    deadline_s: float = math.inf  # set once the plan that names it has been acknowledged: only then has every rank queued it


class CopiesInFlight:
    """Copies by id. `part_order` is the ranks in the order of the parts that they write: their checksums are put together so."""

    def __init__(self, part_order: Sequence[int], limit_s: float) -> None:
        self._part_order = part_order
        self._limit_s = limit_s
        self._copies: dict[int, _Copy] = {}
        self._unclocked: dict[int, list[_Copy]] = {}  # by sequence

    def __len__(self) -> int:
        return len(self._copies)

    def add(self, plan: StepPlan) -> None:
        if plan.loads or plan.saves:
            added = {copy.copy_id: _Copy(copy.deadline_s) for copy in (*plan.loads, *plan.saves)}
            self._copies |= added
            self._unclocked[plan.sequence] = list(added.values())

    def start_clock(self, sequence: int, now_s: float) -> None:
        """To be called when the group has finished step `sequence`."""
        for copy in self._unclocked.pop(sequence, ()):
            copy.deadline_s = max(now_s, copy.not_before_s) + self._limit_s

    def answer(self, rank: int, result: CopyResult) -> CopyResult | None:
        """Notes a rank's share; the group's result when it was the last one. OutOfTurn for a copy that is not expected."""
        copy = self._copies.get(result.copy_id)
        if copy is None or rank in copy.answers:
            raise OutOfTurn(f"answered copy {result.copy_id}, which it was not asked for")
        copy.answers[rank] = result
        if len(copy.answers) < len(self._part_order):
            return None
        del self._copies[result.copy_id]
        answers = [copy.answers[rank] for rank in self._part_order]
        for answer in answers:
            if not answer.ok:
                return CopyResult(result.copy_id, False, b"", answer.reason)
        return CopyResult(result.copy_id, True, b"".join(answer.checksums for answer in answers))

    def overdue(self, now_s: float) -> tuple[set[int], str] | None:
        """Ranks that left a copy unanswered past its deadline, and which. Looks at every copy: not for every poll."""
        for copy_id, copy in self._copies.items():
            if now_s > copy.deadline_s:
                missing = set(self._part_order) - copy.answers.keys()
                return missing, f"not answered copy {copy_id} within {self._limit_s:.3g} s of the time it had"
        return None
