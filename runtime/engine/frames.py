"""Frames of the engine channel: one bidirectional gRPC stream of msgpack arrays per (front door, engine).

    front door -> engine    Submit, Abort, StatusQuery
    engine -> front door    Hello (first, and again when it knows more), StepFrame (when requests are admitted, and one per step that has
                            something for this front door), StatusReply

A frame is `[kind, *fields]`. Token ids travel as little-endian uint32 bytes, everything else as plain values. One front door sees only its
own requests: the engine scopes request ids by stream, and a broken stream aborts all that were submitted over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack

from workers.plain import compile_check
from workers.step import SamplingSettings

METHOD = "/mobula.engine.v1.Engine/Channel"
SECRET_HEADER = "x-mobula-secret"


class Submit(NamedTuple):
    request_id: str
    prompt: bytes
    output: bytes  # of a resumed request: tokens already produced elsewhere
    sampling: list[Any]  # fields of workers.step.SamplingSettings
    max_tokens: int
    end_token_ids: list[int]
    tenant: str
    cache_salt: str
    timeout_s: float | None  # remaining; clocks differ between processes
    pin_ttl_s: float = 0.0  # how long the store is to keep the prompt's blocks; 0: no longer than others


class Abort(NamedTuple):
    request_id: str
    reason: str  # "abort", "stop" (a stop string was found) or "deadline"
    num_output_tokens: int  # tokens that count, when reason is "stop"; else 0


class StatusQuery(NamedTuple):
    query_id: int


class Hello(NamedTuple):
    replica_id: str
    incarnation: str  # new for every start of an engine process
    weights_digest: bytes | None  # None until known: no resume to or from this engine before that
    root: bytes | None  # cache_store.keys.root_key, None until known; decides whose prefix index entries hold here
    block_size: int
    max_model_len: int
    max_queued_tokens: int


class Load(NamedTuple):
    """What a router needs to know of an engine, as of the step that carries it."""

    num_running: int
    num_waiting: int
    num_queued_tokens: int  # prompt tokens not yet computed, of all live requests


class RequestOutput(NamedTuple):
    """What one step gave one request, or what it reuses, when it is admitted: the first carries `cached`, `receipt` and `pin`, the last
    `finish_reason` or `error`."""

    request_id: str
    token_ids: list[int]
    logprobs: list[list[tuple[int, float]]] | bytes | None = None  # as in workers.step.RowResult
    prompt_logprobs: list[list[tuple[int, float]]] | bytes | None = None
    cached: list[int] | None = None  # runtime.request.CachedTokens, on first admission
    finish_reason: str | None = None  # runtime.request.FinishReason
    error: list[str] | None = None  # [name in runtime.errors.BY_NAME, message]
    timings: list[float] | None = None  # [queue_s, store_wait_s], with finish_reason
    receipt: list[Any] | None = None  # runtime.request.Receipt, on first admission
    pin: str | None = None  # runtime.request.PinOutcome, where a pin was asked for


class StepFrame(NamedTuple):
    outputs: list[RequestOutput]
    load: Load


class EngineStats(NamedTuple):
    """Counters for people and dashboards."""

    num_running: int
    num_waiting: int
    total_pages: int
    used_pages: int  # held by live requests
    cached_pages: int
    blocks_pending_offer: int
    leased_slots: int
    num_preemptions: int
    num_steps: int
    step_age_s: float
    store_state: str  # "none", "connecting", "ready" or "lost"


class StatusReply(NamedTuple):
    query_id: int
    stats: EngineStats
    load: Load


Frame = Submit | Abort | StatusQuery | Hello | StepFrame | StatusReply
_KINDS: tuple[type[Frame], ...] = (Submit, Abort, StatusQuery, Hello, StepFrame, StatusReply)
_CHECKS = {kind: compile_check(kind) for kind in _KINDS}
_conforms_to_settings = compile_check(SamplingSettings)
_conforms_to_output = compile_check(RequestOutput)
_conforms_to_load = compile_check(Load)
_are_ids = compile_check(list[int])
_TOKENS_ONLY = [None] * (len(RequestOutput._fields) - 2)  # what follows the token ids of nearly every output


def encode(frame: Frame) -> bytes:
    payload: bytes = msgpack.packb((_KINDS.index(type(frame)), *frame))
    return payload


def decode(payload: bytes) -> Frame:
    """The inverse of `encode`. ValueError for anything that is not a frame: what comes out has the types that its class states."""
    try:
        kind, *fields = msgpack.unpackb(payload)
    except (TypeError, ValueError, OverflowError, msgpack.UnpackException) as error:
        raise ValueError(f"not a frame of the engine channel: {error}") from error
    if type(kind) is not int or not 0 <= kind < len(_KINDS):
        raise ValueError(f"not a frame of the engine channel: there is no kind {kind!r:.40}")
    cls = _KINDS[kind]
    if cls is StepFrame:
        return _step_frame(fields)
    if not _CHECKS[cls](fields) or (cls is Submit and not _conforms_to_settings(fields[3])):
        raise ValueError(f"not a frame of the engine channel: a {cls.__name__} whose fields are not of their types")
    if cls is StatusReply:
        query_id, stats, load = fields
        return StatusReply(query_id, EngineStats(*stats), Load(*load))
    frame: Frame = cls(*fields)
    return frame


def _step_frame(fields: list[Any]) -> StepFrame:
    """The frame of every step: outputs of tokens alone, which are nearly all, are judged the short way."""
    if len(fields) == 2 and type(fields[0]) is list and _conforms_to_load(fields[1]):
        outputs, load = fields
        for output in outputs:
            is_plain = type(output) is list and output[2:] == _TOKENS_ONLY
            if not (type(output[0]) is str and _are_ids(output[1]) if is_plain else _conforms_to_output(output)):
                break
        else:
            return StepFrame([RequestOutput(*output) for output in outputs], Load(*load))
    raise ValueError("not a frame of the engine channel: a StepFrame whose fields are not of their types")
