"""What a group keeps while its ranks load a model, and how their reports become one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from workers.channels import RankGone
from workers.step import GroupInfo
from workers.wire import Message, Progress, RankFacts, Unloaded

_NUM_SHARED_FACTS = RankFacts._fields.index("first_written_part")

ProgressCallback = Callable[[int, str, int, int], None]  # rank, phase, done, total


class Loading:
    """The state of one `load`: what is being asked, and who has answered."""

    def __init__(self, progress: ProgressCallback, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.answers: dict[int, Message] = {}
        self.phases: dict[int, str] = {}
        self._progress = progress
        self._kind: type[Message] = Unloaded
        self.deadline_s = 0.0

    def ask(self, kind: type[Message]) -> None:
        self._kind = kind
        self.answers = {}
        self.deadline_s = time.monotonic() + self.timeout_s

    def take(self, rank: int, message: Message) -> bool:
        """False when the message has no place here."""
        if isinstance(message, Progress):
            self.phases[rank] = f"{message.phase} {message.done}/{message.total}"
            self._progress(rank, *message)
        elif isinstance(message, self._kind) and rank not in self.answers:
            self.answers[rank] = message
        else:
            return False
        self.deadline_s = time.monotonic() + self.timeout_s
        return True


def order_of_parts(facts: Sequence[RankFacts]) -> list[int]:
    """The ranks in the order of the parts that they write. RankGone when they loaded different things, or would not write all parts."""
    for rank, theirs in enumerate(facts):
        for name, first, value in zip(RankFacts._fields[1:_NUM_SHARED_FACTS], facts[0][1:], theirs[1:], strict=False):
            if value != first:
                raise RankGone(rank, f"loaded something else than rank 0: {name} is {value!r}, not {first!r}")
    order = sorted(range(len(facts)), key=lambda rank: facts[rank].first_written_part)
    next_part = 0
    for rank in order:
        if facts[rank].num_written_parts and facts[rank].first_written_part != next_part:
            raise RankGone(rank, f"said that it writes parts from {facts[rank].first_written_part}, where {next_part} is next")
        next_part += facts[rank].num_written_parts
    if next_part != facts[0].layout.num_parts:
        raise RankGone(order[-1], f"said that parts end at {next_part}, where a block has {facts[0].layout.num_parts}")
    return order


def group_info(facts: Sequence[RankFacts], pids: list[tuple[int, int]]) -> GroupInfo:
    """What ranks that agree know together. A page must be there on every rank."""
    first = facts[0]
    return GroupInfo(
        num_pages=min(fact.num_pages for fact in facts),
        block_size=first.block_size,
        max_model_len=first.max_model_len,
        vocab_size=first.vocab_size,
        layout=first.layout,
        model_config=first.model_config,
        weights_digest=first.weights_digest,
        compute_dtype=first.compute_dtype,
        max_num_seqs=first.max_num_seqs,
        max_num_batched_tokens=first.max_num_batched_tokens,
        max_prompt_tokens_beside_outputs=first.max_prompt_tokens_beside_outputs,
        pids=pids,
    )
