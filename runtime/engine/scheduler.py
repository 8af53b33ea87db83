"""Who gets which tokens of the next step. Pure: requests, pages and answers in, a StepPlan out; no clock, no sockets, no torch.

A plan may be made before the result of the one before it. So the scheduler counts on every launched step (`num_known`, `num_computed`)
and `outputs` confirms. What that allows and forbids:

    a row is planned up to its last possible token and no further; an end token found late costs one row, which outputs drops
    a preempted request comes back only after the results of its launched steps are in, because their tokens count
    pages of a row that ends are allocatable only after the last launched step that names them (block_manager)

One plan: tokens of running outputs, then prompts that are under way, then admission of waiting requests in the order of arrival. Beside
outputs prompts get a limited share, since every output waits for the whole step.
"""

from __future__ import annotations

import bisect
import enum
import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from cache_store.keys import BlockKey
from runtime.engine.block_manager import BlockManager
from runtime.engine.config import EngineConfig, StepLimits
from runtime.engine.live import LiveRequest, LoadGate, Phase
from runtime.engine.receipts import FirstBlocks, make_receipt
from runtime.request import CachedTokens
from workers.step import BlockCopy, NewRow, StepPlan, StepRow

SHORT_SHARE = 4  # 1/4 of a step's prompt tokens goes to prompts shorter than the one in front, while there are any
BACKLOG_STEPS = 16  # prompts that wait may take more of a step that also gives outputs, so that no more such steps than this pass first
BACKLOG_FADES = 0.985  # a step: as fewer prompts are left to wait, steps keep nearly the size they began with
PADDED_TO = 128  # tokens: a GPU pads steps to multiples of this, and long ones of twice as many, and computes the padding too
SHORT_LOOKAHEAD = 16  # waiting requests that are looked at for that

_by_arrival = attrgetter("arrival")


class Launched(NamedTuple):
    """A plan, and the requests of its rows."""

    plan: StepPlan
    requests: list[LiveRequest]  # in the order of plan.rows
    admitted: list[LiveRequest]


@dataclass(slots=True)
class _Step:
    """The plan under construction."""

    sequence: int
    budget: int  # tokens left
    rows: list[StepRow] = field(default_factory=list)
    requests: list[LiveRequest] = field(default_factory=list)
    rows_in: list[NewRow] = field(default_factory=list)
    admitted: list[LiveRequest] = field(default_factory=list)
    num_stalled: int = 0  # rows that wait for pages of rows that have just ended
    num_preempted: int = 0
    waits: bool = False  # for loads


class _Placement(enum.Enum):
    PLACED = "placed"
    LATER = "later"  # a running row is computing what this one needs; others may overtake
    NO_ROOM = "no room"


class Scheduler:
    """Owned by the engine's thread."""

    def __init__(self, config: EngineConfig, limits: StepLimits, blocks: BlockManager) -> None:
        self.waiting: deque[LiveRequest] = deque()
        self.running: list[LiveRequest] = []  # in the order of arrival
        self.num_preemptions = 0
        self.sequence = 0  # of the last plan
        self._config = config
        self._limits = limits
        self._blocks = blocks
        self._first_blocks = FirstBlocks()
        self._rows_out: list[int] = []
        self._row_ids = itertools.count(1)
        self._waiting_tokens = 0
        self._backlog = 0.0  # tokens; the most that have waited of late
        self._running_prompt_tokens = 0
        self._no_room: tuple[LiveRequest, int] | None = None  # the request that had no room, and blocks.num_changes then

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens not yet computed (or launched), of all live requests."""
        return self._waiting_tokens + self._running_prompt_tokens

    @property
    def num_open_rows(self) -> int:
        return self._limits.max_rows - len(self.running)

    def add(self, request: LiveRequest) -> None:
        self.waiting.append(request)
        self._waiting_tokens += request.num_prompt

    def remove(self, request: LiveRequest) -> None:
        """Ends a request; its results still in flight count for nothing."""
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
            self._leave_batch(request)
        elif request.phase is not Phase.FINISHED:
            self.waiting.remove(request)
            self._waiting_tokens -= request.num_prompt
            self._blocks.unpin(request.held_pages)
            request.held_pages = []
        self._no_room = None
        request.phase = Phase.FINISHED

    def is_alone(self, request: LiveRequest) -> bool:
        """Whether no other request runs or waits."""
        return not self.running and len(self.waiting) == 1 and self.waiting[0] is request

    def start_again(self, request: LiveRequest) -> None:
        """Takes a running request out of the batch, to be admitted anew once nothing of it is in flight."""
        self.running.remove(request)
        self._wait_first(request)

    def plan(self, loads: Sequence[BlockCopy] = (), saves: Sequence[BlockCopy] = ()) -> Launched | None:
        """The next step; None when it would neither compute nor copy anything."""
        step = _Step(self.sequence + 1, self._limits.max_num_batched_tokens)
        if not self._waiting_tokens:
            self._backlog = 0.0
        prompts = self._plan_outputs(step)
        if prompts:
            self._plan_prompts(step, prompts)
        else:
            self._admit(step)
        if not (step.rows or loads or saves):
            return None
        self.sequence = step.sequence
        plan = StepPlan(step.sequence, self._rows_out, step.rows_in, step.rows, list(loads), list(saves), step.waits)
        self._rows_out = []
        return Launched(plan, step.requests, step.admitted)

    def _plan_outputs(self, step: _Step) -> list[LiveRequest]:
        """One token for every row that is past its prompt. Returns the rows that are not."""
        rows, requests, prompts = step.rows, step.requests, []
        running, sequence = self.running, step.sequence
        for request in running:  # preemption shortens the list at its end
            known, computed = request.num_known, request.num_computed
            if known >= request.plan_limit:
                continue  # all its tokens are launched
            if computed < request.num_prompt or known - computed > 1:
                prompts.append(request)
                continue
            row = request.decode_row
            if computed >= request.num_positions:
                page = self._page_for(request, step)
                if page is None:
                    continue
                row = StepRow(request.row_id, 1, 0, 0, [page])
            rows.append(row)
            requests.append(request)
            request.num_known = known + 1
            request.num_computed = computed + 1
            request.num_in_flight += 1
            request.last_step = sequence
        step.budget -= len(rows)
        if rows:
            step.budget = min(step.budget, self._beside_outputs(len(rows)))
        return prompts

    def _beside_outputs(self, num_outputs: int) -> int:
        """Prompt tokens of a step with so many outputs."""
        most = BACKLOG_STEPS * self._limits.max_num_batched_tokens
        self._backlog = min(max(self._waiting_tokens, BACKLOG_FADES * self._backlog), most)
        share = max(self._limits.max_prompt_tokens_beside_outputs, int(self._backlog) // BACKLOG_STEPS)
        total = num_outputs + share
        rest = total % (PADDED_TO if total < 8 * PADDED_TO else 2 * PADDED_TO)
        return share - rest if rest < share else share

    def _page_for(self, request: LiveRequest, step: _Step) -> int | None:
        """A page for the next position of a row. None: the row sits this step out, or was preempted itself."""
        blocks = self._blocks
        while not blocks.num_available:
            if step.num_stalled < blocks.num_deferred:
                step.num_stalled += 1  # enough pages return with results that are under way: preempting more would not be faster
                return None
            if self.drop_held_pages():
                continue
            victim = self.running[-1]
            self._preempt(victim)
            step.num_preempted += 1
            if victim is request:
                return None
        (page,) = blocks.allocate(1)
        request.pages.append(page)
        request.num_positions += blocks.block_size
        return page

    def _plan_prompts(self, step: _Step, prompts: list[LiveRequest]) -> None:
        """Prompts that are under way, then admission.

        The prompt in front gets all tokens it can use, but for a share that shorter ones behind it may take; what they leave is its own.
        """
        front, *behind = prompts
        left = front.num_known - front.num_computed
        share = min(left, step.budget)
        if share < left and self._is_shorter_behind(left, behind):
            share = max(1, share - step.budget // SHORT_SHARE)
        step.budget -= share
        for request in behind:
            need = request.num_known - request.num_computed
            if step.budget and (share == left or need < left):
                self._plan_chunk(step, request, self._spend(step, need))
        self._admit(step)
        self._plan_chunk(step, front, share + self._spend(step, left - share))

    def _is_shorter_behind(self, left: int, behind: list[LiveRequest]) -> bool:
        if any(request.num_known - request.num_computed < left for request in behind):
            return True
        return any(
            len(request.tokens) < left and request.load_gate is LoadGate.OPEN for request in itertools.islice(self.waiting, SHORT_LOOKAHEAD)
        )

    def _spend(self, step: _Step, need: int) -> int:
        count = min(need, step.budget)
        step.budget -= count
        return count

    def _plan_chunk(self, step: _Step, request: LiveRequest, count: int) -> None:
        """`count` more known tokens of a row. Sampling is implied once all known ones are computed."""
        step.rows.append(request.decode_row if count == 1 else StepRow(request.row_id, count, 0, 0, []))
        step.requests.append(request)
        self._running_prompt_tokens -= _prompt_left(request)
        request.num_computed += count
        self._running_prompt_tokens += _prompt_left(request)
        if request.num_computed == request.num_known:
            request.num_known += 1
        request.num_in_flight += 1
        request.last_step = step.sequence

    def _admit(self, step: _Step) -> None:
        """Waiting requests in order, as far as rows, tokens and pages go."""
        if step.num_stalled or step.num_preempted:
            return  # rows that run come first
        for request in self.waiting:
            if not (step.budget and self.num_open_rows) or request.num_in_flight or request.load_gate is LoadGate.NO_ROOM:
                break
            if request.load_gate is LoadGate.WAIT:
                continue
            placement = self._place(request, step)
            if placement is _Placement.NO_ROOM:
                break
            if placement is _Placement.PLACED:
                step.rows_in.append(_new_row(request))
                step.admitted.append(request)
                self._plan_chunk(step, request, self._spend(step, request.num_known - request.num_computed))
        for request in step.admitted:
            self.waiting.remove(request)
            self._waiting_tokens -= request.num_prompt

    def _place(self, request: LiveRequest, step: _Step) -> _Placement:
        """Gives a request its pages and a row: published ones where its prefix matches, new ones for all other known tokens."""
        blocks = self._blocks
        if request.waits_for is not None and blocks.is_announced(request.waits_for):
            return _Placement.LATER
        request.waits_for = None
        if self._no_room == (request, blocks.num_changes):
            return _Placement.NO_ROOM
        keys: list[BlockKey] = []
        if self._config.prefix_caching:
            keys = request.extend_keys(blocks.block_size)[: request.num_reusable_blocks(blocks.block_size)]
        num_hits, num_held = blocks.match(keys), len(request.held_pages)
        # What it holds and nobody finds in that page is still on its way, also where a row has computed the same block meanwhile.
        is_ahead = any(blocks.page_of(key) != page for key, page in zip(keys, request.held_pages, strict=False))
        num_hits = max(num_hits, num_held)
        if num_hits < len(keys) and blocks.is_announced(keys[num_hits]):
            request.waits_for = keys[num_hits]
            return _Placement.LATER
        num_new = -(-len(request.tokens) // blocks.block_size) - num_hits
        reserve = len(self.running)  # so that an admission does not preempt those who run at their next page
        while blocks.num_available - blocks.num_idle(keys[num_held:num_hits]) < num_new + reserve:
            if not self.drop_held_pages(behind=request):
                self._no_room = (request, blocks.num_changes)
                return _Placement.NO_ROOM
        pages = request.held_pages + blocks.pin_published(keys[num_held:num_hits]) + blocks.allocate(num_new)
        self._enter_batch(request, pages, num_hits)
        step.waits |= is_ahead
        return _Placement.PLACED

    def _enter_batch(self, request: LiveRequest, pages: list[int], num_hits: int) -> None:
        blocks = self._blocks
        request.held_pages = []  # they are among `pages`
        request.phase = Phase.RUNNING
        request.row_id = next(self._row_ids)
        request.decode_row = StepRow(request.row_id, 1, 0, 0, [])
        request.pages = pages
        request.num_positions = len(pages) * blocks.block_size
        request.num_known = len(request.tokens)
        request.num_computed = request.num_confirmed = num_hits * blocks.block_size
        request.num_published = num_hits
        if request.cached is None:
            request.cached = _cached_tokens(request, num_hits, blocks.block_size)
            request.receipt = make_receipt(request, num_hits, blocks, self._first_blocks, prefix_caching=self._config.prefix_caching)
        if self._config.prefix_caching:
            blocks.announce(request.keys[num_hits:], request.row_id)
        self._running_prompt_tokens += _prompt_left(request)
        bisect.insort(self.running, request, key=_by_arrival)

    def _leave_batch(self, request: LiveRequest) -> None:
        """The row's pages return, its leading ones to the cache; workers hear of it with the next plan."""
        self._running_prompt_tokens -= _prompt_left(request)
        self._rows_out.append(request.row_id)
        self._blocks.withdraw(request.keys, request.row_id)
        self._blocks.unpin(request.pages, request.last_step)
        request.pages = []

    def _preempt(self, victim: LiveRequest) -> None:
        """The latest arrival gives its pages up and waits at the head of the queue."""
        popped = self.running.pop()
        assert popped is victim
        self._wait_first(victim)
        self.num_preemptions += 1

    def _wait_first(self, request: LiveRequest) -> None:
        self._leave_batch(request)
        request.phase = Phase.PREEMPTED
        self.waiting.appendleft(request)
        self._waiting_tokens += request.num_prompt

    def drop_held_pages(self, behind: LiveRequest | None = None) -> bool:
        """Unpins what the last waiting request holds that is behind `behind` (None: any); it stays cached. False when there is none."""
        for request in reversed(self.waiting):
            if request is behind:
                return False
            if request.held_pages:
                self._blocks.unpin(request.held_pages)
                request.held_pages = []
                return True
        return False


def _prompt_left(request: LiveRequest) -> int:
    return max(0, request.num_prompt - request.num_computed)


def _new_row(request: LiveRequest) -> NewRow:
    return NewRow(
        request.row_id,
        request.tokens.tobytes(),
        request.num_prompt,
        request.num_computed,
        list(request.pages),
        request.row_sampling(),
    )


def _cached_tokens(request: LiveRequest, num_hits: int, block_size: int) -> CachedTokens:
    """Reused prompt tokens by tier. A hit may reach past a resumed request's prompt; the last prompt token never counts."""
    num_tokens = min(num_hits * block_size, request.num_prompt - 1)
    num_full, rest = divmod(num_tokens, block_size)
    counts = dict.fromkeys(CachedTokens._fields, 0)
    for tier, count in Counter([tier for index, tier in request.load_tiers.items() if index < num_full]).items():
        counts[tier] = count * block_size
    if rest and num_full in request.load_tiers:
        counts[request.load_tiers[num_full]] += rest
    counts["pages"] += num_tokens - sum(counts.values())
    return CachedTokens(**counts)
