"""Frames between an engine and its ranks: four bytes of length (little-endian), then a msgpack array `[kind, *fields]`.

    engine -> rank    Welcome or Refused, once; then Unload, Host, Load, ArenaSpec, StepPlan, Ping, Close
    rank  -> engine   Hello, once, first; then Unloaded, Hosted, Progress, Loaded, StepResult (rank 0) or Ack, CopiesDone, Pong, RankError

A frame is read in one piece and judged against a limit before memory is taken for it; until a rank has said who it is, that limit is small.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgpack

from cache_store.keys import Layout
from workers.plain import compile_check
from workers.step import ArenaSpec, BlockCopy, CopyResult, NewRow, RowResult, SamplingSettings, StepPlan, StepResult, StepRow

MAX_FRAME_BYTES = 1 << 30  # a step's full-vocabulary logprobs are the largest thing that travels
MAX_HELLO_BYTES = 4096
LENGTH = struct.Struct("<I")
_LOGPROBS = (RowResult._fields.index("logprobs"), RowResult._fields.index("prompt_logprobs"))

Row = TypeVar("Row", StepRow, RowResult)


class Hello(NamedTuple):
    rank: int
    pid: int
    start_ticks: int
    secret: str


class Welcome(NamedTuple):
    world_size: int


class Refused(NamedTuple):
    reason: str


class Unload(NamedTuple):
    """Free the model and leave the communicator, so that another configuration can be loaded."""


class Unloaded(NamedTuple):
    pass


class Host(NamedTuple):
    """To rank 0: open the rendezvous of the next communicator on `host`."""

    host: str


class Hosted(NamedTuple):
    port: int


class Load(NamedTuple):
    config: dict[str, Any]  # fields of workers.config.WorkerConfig
    host: str  # of the rendezvous
    port: int


class Progress(NamedTuple):
    phase: str
    done: int
    total: int


class RankFacts(NamedTuple):
    """What one rank knows once its model is loaded; the same on every rank except the first and the last two."""

    num_pages: int
    block_size: int
    max_model_len: int
    vocab_size: int
    layout: Layout
    model_config: bytes
    weights_digest: bytes | None
    compute_dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_prompt_tokens_beside_outputs: int
    first_written_part: int
    num_written_parts: int


class Loaded(NamedTuple):
    facts: RankFacts


class Ack(NamedTuple):
    sequence: int


class CopiesDone(NamedTuple):
    """This rank's share of some copies. `checksums` of a save are those of the parts that this rank writes."""

    results: list[CopyResult]


class Ping(NamedTuple):
    number: int


class Pong(NamedTuple):
    number: int


class RankError(NamedTuple):
    """The rank ends: the class and text of what was raised."""

    name: str
    message: str


class Close(NamedTuple):
    pass


Message = (
    Hello | Welcome | Refused | Unload | Unloaded | Host | Hosted | Load | Progress | Loaded | ArenaSpec
    | StepPlan | StepResult | Ack | CopiesDone | Ping | Pong | RankError | Close
)  # fmt: skip
_KINDS: tuple[type[Message], ...] = (
    Hello, Welcome, Refused, Unload, Unloaded, Host, Hosted, Load, Progress, Loaded, ArenaSpec,
    StepPlan, StepResult, Ack, CopiesDone, Ping, Pong, RankError, Close,
)  # fmt: skip
_KIND_OF = {cls: kind for kind, cls in enumerate(_KINDS)}
# Messages of every step have builders of their own: a rank or an engine that sends nonsense there ends its group.
_CHECKS = {cls: compile_check(cls) for cls in _KINDS if cls not in (Loaded, StepPlan, StepResult)}


def encode(message: Message) -> bytes:
    """One whole frame. ValueError when it is over MAX_FRAME_BYTES."""
    fields: tuple[Any, ...] = message
    if isinstance(message, StepPlan):
        fields = (message.sequence, message.rows_out, message.rows_in, _columns(message.rows), message.loads, message.saves, message.waits)
    elif isinstance(message, StepResult):
        fields = (message.sequence, _columns(message.rows), message.forward_s)
    elif isinstance(message, Loaded):
        facts = message.facts
        fields = ((*facts[:4], _layout_fields(facts.layout), *facts[5:]),)
    payload: bytes = msgpack.packb((_KIND_OF[type(message)], *fields))
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"a {type(message).__name__} of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES} bytes for one frame")
    return LENGTH.pack(len(payload)) + payload


def decode(payload: bytes | memoryview) -> Message:
    """The inverse of `encode`, without the length. ValueError for anything that is not a frame."""
    try:
        kind, *fields = msgpack.unpackb(payload, strict_map_key=True)
        if type(kind) is not int or not 0 <= kind < len(_KINDS):
            raise ValueError(f"there is no kind {kind!r:.40}")
        cls = _KINDS[kind]
        if cls in _CHECKS and not _CHECKS[cls](fields):
            raise ValueError(f"a {cls.__name__} whose fields are not of their types")
        message: Message = _BUILD.get(cls, cls)(*fields)
        return message
    except (TypeError, IndexError, ValueError, OverflowError, msgpack.UnpackException) as error:
        raise ValueError(f"not a frame between an engine and its ranks: {error}") from error


def _layout_fields(layout: Layout) -> tuple[Any, ...]:
    return (layout.codec, layout.group, layout.block_size, layout.dtype, layout.num_parts, layout.part_shape, layout.version)


def _build_loaded(facts: list[Any]) -> Loaded:
    codec, group, block_size, dtype, num_parts, part_shape, version = facts[4]
    facts[4] = Layout(codec, group, block_size, dtype, num_parts, tuple(part_shape), version)
    return Loaded(RankFacts(*facts))


def _build_new_row(fields: list[Any]) -> NewRow:
    row = NewRow(*fields)
    return row._replace(sampling=SamplingSettings(*row.sampling))


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The fields of all rows, field by field. A third faster than row by row, and every running request has a row."""
    return list(zip(*rows, strict=True))


def build_rows(cls: type[Row], columns: Sequence[Sequence[Any]]) -> list[Row]:
    """The inverse of `_columns`; a NamedTuple's own constructor costs twice as much as the tuple's."""
    if columns and len(columns) != len(cls._fields):
        raise ValueError(f"a {cls.__name__} has {len(cls._fields)} fields, not {len(columns)}")
    return list(map(partial(tuple.__new__, cls), zip(*columns, strict=True)))


def _build_plan(
    sequence: int, rows_out: list[int], rows_in: list[Any], rows: list[Any], loads: list[Any], saves: list[Any], waits: bool
) -> StepPlan:
    return StepPlan(
        sequence,
        rows_out,
        [_build_new_row(fields) for fields in rows_in],
        build_rows(StepRow, rows),
        list(map(BlockCopy._make, loads)),
        list(map(BlockCopy._make, saves)),
        waits,
    )


def _build_result(sequence: int, columns: list[Any], forward_s: float) -> StepResult:
    rows = build_rows(RowResult, columns)
    if any(any(columns[field]) for field in _LOGPROBS if columns):
        rows = [row._replace(logprobs=_pairs(row.logprobs), prompt_logprobs=_pairs(row.prompt_logprobs)) for row in rows]
    return StepResult(sequence, rows, forward_s)


def _build_copies_done(results: list[Any]) -> CopiesDone:
    return CopiesDone(list(map(CopyResult._make, results)))


def _pairs(logprobs: Any) -> Any:
    if isinstance(logprobs, list):
        return [[(token_id, logprob) for token_id, logprob in position] for position in logprobs]
    return logprobs


_BUILD: dict[type[Message], Callable[..., Any]] = {
    Loaded: _build_loaded,
    StepPlan: _build_plan,
    StepResult: _build_result,
    CopiesDone: _build_copies_done,
}
