"""What an engine says to the ranks of its group, and what they answer. Pure data: no torch, no sockets.

Every message is a NamedTuple of plain values, so msgpack writes it as a short array and a type checker still sees names.

    engine -> ranks     StepPlan (deltas against the batch the ranks keep), ArenaSpec
    ranks  -> engine    StepResult (from rank 0; the others acknowledge), CopyResult, GroupInfo

One plan runs after the other, in the order of `sequence`; the engine may send plan n+1 before the result of n is back. A row's sampled
token stays on the device and is the input of its next step, so a plan never carries output tokens of a running row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from cache_store.keys import Layout

NULL_PAGE = 0  # never allocated: padding and holes point at it
ALL_LOGPROBS = -1  # a logprobs count that asks for the whole vocabulary (tests and evaluation)


class SamplingSettings(NamedTuple):
    """How a row's tokens are drawn, in the order in which the settings apply. Defaults change nothing."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 1.0  # 0: greedy
    min_p: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0  # unsigned 64 bits
    num_logprobs: int | None = None  # None: none; 0: the chosen token's only; n: also the n best; ALL_LOGPROBS
    num_prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0


class NewRow(NamedTuple):
    """A row that enters the batch. `row_id` is new for every admission: a preempted request comes back as another row."""

    row_id: int
    token_ids: bytes  # all known tokens (prompt, then outputs so far), little-endian uint32
    num_prompt_tokens: int
    num_computed_tokens: int  # their keys and values are in `pages` already
    pages: list[int]  # page i holds positions [i * block_size, (i + 1) * block_size)
    sampling: SamplingSettings


class StepRow(NamedTuple):
    """One row's share of a step: `num_query_tokens` positions from where the row stands.

    A row whose known tokens are all computed after the step samples its next one.
    """

    row_id: int
    num_query_tokens: int
    num_draft_tokens: int  # 0 until speculation
    adapter: int  # 0: none
    new_pages: list[int]  # appended to the row's pages before the step


class BlockCopy(NamedTuple):
    """One page to or from one slot of the arena. Each rank copies its own part of the block."""

    copy_id: int
    page: int
    offset: int  # of the slot, from the arena's data_offset
    generation: int  # of the slot; a different word before or after the copy makes it fail
    deadline_s: float  # CLOCK_MONOTONIC; a copy not started by then fails without touching the slot
    checksums: bytes  # of a load: xxh3-64 of every part of the block, little-endian; of a save: empty


class StepPlan(NamedTuple):
    """Applied in the order of the fields: rows out, rows in, the forward pass over `rows`; then saves and loads are queued.

    Loads may start at once: the engine names only pages that no earlier step touches, nor this or a later one unless it waits. Saves read
    pages written by earlier steps.
    """

    sequence: int  # 1, 2, 3, ...
    rows_out: list[int]
    rows_in: list[NewRow]
    rows: list[StepRow]
    loads: list[BlockCopy]
    saves: list[BlockCopy]
    waits: bool = False  # no layer reads pages before the loads so far have brought them; their results come before the step's


class RowResult(NamedTuple):
    """What one row of a step produced. A row in the middle of its prompt produces an empty list."""

    row_id: int
    token_ids: list[int]
    logprobs: list[list[tuple[int, float]]] | bytes | None = None
    """Per new token: the chosen (id, logprob), then the best ones. ALL_LOGPROBS: little-endian float32 [tokens, vocabulary]."""
    prompt_logprobs: list[list[tuple[int, float]]] | bytes | None = None
    """The same for the prompt positions scored by this step. Position p is scored by the logits of p - 1; position 0 never is."""


class StepResult(NamedTuple):
    """The group finished the step: every rank has acknowledged `sequence`. `rows` in the order of the plan's rows."""

    sequence: int
    rows: list[RowResult]
    forward_s: float


class CopyResult(NamedTuple):
    """The group finished a copy: every rank has answered. `checksums` of a save: xxh3-64 of every part, little-endian."""

    copy_id: int
    ok: bool
    checksums: bytes
    reason: str = ""  # when not ok: "generation", "checksum", "deadline" or "arena"


class ArenaSpec(NamedTuple):
    """Where the store's memory is. Copies of later plans mean this arena."""

    path: str
    total_bytes: int
    data_offset: int
    slot_bytes: int


class GroupInfo(NamedTuple):
    """What a group knows about itself once it is ready."""

    num_pages: int  # the smallest over the ranks, including the null page
    block_size: int
    max_model_len: int
    vocab_size: int
    layout: Layout
    model_config: bytes  # digest input of the root: canonical JSON of all that decides a block's bytes besides the weights
    weights_digest: bytes | None  # known at once for dummy weights; None: to be computed from the files
    compute_dtype: str
    max_num_seqs: int  # rows that the ranks have room for
    max_num_batched_tokens: int  # of one step
    max_prompt_tokens_beside_outputs: int  # of one that gives a running request a token, unless settings say otherwise
    pids: list[tuple[int, int]]  # (pid, start ticks) of every rank


class WorkerGroup(Protocol):
    """The ranks of one replica, as the engine sees them. Implemented by `workers.group`, faked in tests."""

    @property
    def info(self) -> GroupInfo: ...

    def submit(self, plan: StepPlan) -> None:
        """Sends the plan to every rank and returns at once. GroupFailed when a rank is gone."""
        ...

    def poll(self, timeout_s: float) -> list[StepResult | CopyResult]:
        """What the whole group has finished since the last call, waiting up to `timeout_s` for the first, or until `wake`.

        GroupFailed on a dead rank, a gap in the sequence, or a step past its deadline.
        """
        ...

    def wake(self) -> None:
        """Makes a `poll` that is waiting return. May be called from any thread."""
        ...

    def attach_arena(self, arena: ArenaSpec) -> None: ...

    def close(self) -> None: ...
