"""Events as messages of the inference service."""

from __future__ import annotations

from protos import inference_pb2 as pb
from runtime.frontdoor.pipeline import Event, Finished, Logprobs, Started, Tokens
from runtime.request import TIERS, FinishReason, PinOutcome

_REASONS = {FinishReason.STOP: pb.STOP, FinishReason.LENGTH: pb.LENGTH, FinishReason.ABORT: pb.ABORT}
_PINS = {
    None: pb.PIN_OUTCOME_UNSPECIFIED,
    PinOutcome.TAKEN: pb.PIN_TAKEN,
    PinOutcome.NO_STORE: pb.PIN_NO_STORE,
    PinOutcome.TOO_MANY: pb.PIN_TOO_MANY,
    PinOutcome.TOO_SHORT: pb.PIN_TOO_SHORT,
}


def event_message(event: Event) -> pb.GenerateEvent:
    if isinstance(event, Tokens):
        if event.logprobs is None and event.prompt_logprobs is None:
            return pb.GenerateEvent(tokens=pb.Tokens(token_ids=event.token_ids, text=event.text))
        return pb.GenerateEvent(
            tokens=pb.Tokens(
                token_ids=event.token_ids,
                text=event.text,
                logprobs=_positions(event.logprobs),
                prompt_logprobs=_positions(event.prompt_logprobs),
            )
        )
    if isinstance(event, Started):
        return pb.GenerateEvent(started=pb.Started(**event._asdict()))
    return pb.GenerateEvent(finished=_finished(event))


def _positions(logprobs: Logprobs | None) -> list[pb.PositionLogprobs]:
    return [
        pb.PositionLogprobs(entries=[pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entries])
        for entries in logprobs or ()
    ]


def _finished(event: Finished) -> pb.Finished:
    usage = event.usage
    return pb.Finished(
        reason=_REASONS[event.reason],
        stop_match=event.stop_match,
        usage=pb.Usage(
            num_prompt_tokens=usage.num_prompt_tokens,
            num_completion_tokens=usage.num_completion_tokens,
            num_cached_tokens=usage.cached.total,
            cached_tokens_by_tier=dict(zip(TIERS, usage.cached, strict=True)),
            num_computed_tokens=usage.receipt.num_computed_tokens,
            bytes_loaded=usage.receipt.bytes_loaded,
            not_reused_tokens_by_reason=usage.receipt.not_reused,
            pin=_PINS[usage.pin],
        ),
        timings=pb.Timings(**event.timings._asdict()),
    )
