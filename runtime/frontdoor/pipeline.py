"""A valid request to the events its caller sees. The gRPC service and offline generation share it.

The caller owns the pace: an event is made when it is asked for, so several tokens share one only when the caller is behind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import NamedTuple

from runtime.engine.frames import RequestOutput
from runtime.frontdoor.record import RequestRecord
from runtime.metrics import FrontDoorMetrics
from runtime.request import TIERS, CachedTokens, FinishReason, PinOutcome, Receipt, Timings, ValidRequest
from runtime.routing.router import Dispatch, Router
from runtime.text.detokenize import Detokenizer
from runtime.text.stop import OutputPiece, OutputText
from runtime.text.tokenizer import Tokenizer

MAX_EVENT_POSITIONS = 256  # tokens, or prompt positions with logprobs, in one event: keeps messages well below 1 MiB

Logprobs = list[list[tuple[int, float]]]


class Started(NamedTuple):
    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    replica_id: str


class Tokens(NamedTuple):
    token_ids: Sequence[int]
    text: str
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


class Usage(NamedTuple):
    num_prompt_tokens: int
    num_completion_tokens: int
    cached: CachedTokens
    receipt: Receipt = Receipt()
    pin: PinOutcome | None = None  # where one was asked for


class Finished(NamedTuple):
    reason: FinishReason
    stop_match: str
    usage: Usage
    timings: Timings


Event = Started | Tokens | Finished


class AbortSwitch:
    """Lets someone other than the reader end a generation, before or while it runs."""

    def __init__(self) -> None:
        self._dispatch: Dispatch | None = None
        self._is_on = False

    def abort(self) -> None:
        self._is_on = True
        if self._dispatch is not None:
            self._dispatch.abort()

    def bind(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        if self._is_on:
            dispatch.abort()


class Pipeline:
    def __init__(self, router: Router, tokenizer: Tokenizer | None, metrics: FrontDoorMetrics) -> None:
        """Without a tokenizer events carry token ids and no text."""
        self._router = router
        self._tokenizer = tokenizer
        self._metrics = metrics

    async def generate(
        self, request: ValidRequest, record: RequestRecord | None = None, switch: AbortSwitch | None = None
    ) -> AsyncGenerator[Event, None]:
        """Started, then Tokens, then Finished; or raises one of runtime.errors.

        Leaving early (aclose, cancellation) aborts the request at its engine. `record` is kept up to date with what has been sent.
        """
        dispatch = self._router.dispatch(request)
        if switch is not None:
            switch.bind(dispatch)
        make_detokenizer = self._tokenizer.new_detokenizer if self._tokenizer else _NoText
        text = OutputText(make_detokenizer, request.stop.stop, request.output_token_ids)
        progress = _Progress(request, text, self._metrics, record or RequestRecord(request.request_id, request.tenant))
        async with contextlib.aclosing(dispatch.outputs()) as batches:
            async for batch in batches:
                for event in progress.events(batch, dispatch.replica_id):
                    if isinstance(event, Finished) and event.stop_match:
                        dispatch.stop_matched(event.usage.num_completion_tokens)
                    yield event
                if progress.is_finished:
                    return


class _Progress:
    """How far one request has come: turns batches of engine outputs into events."""

    def __init__(self, request: ValidRequest, text: OutputText, metrics: FrontDoorMetrics, record: RequestRecord) -> None:
        self.is_finished = False
        self._request = request
        self._text = text
        self._metrics = metrics
        self._record = record
        self._last_event_s = 0.0  # of the last event with tokens; 0 before the first
        self._receipt = Receipt()
        self._pin: PinOutcome | None = None
        record.num_prompt_tokens = len(request.prompt_token_ids)
        record.num_completion_tokens = len(request.output_token_ids)

    def events(self, batch: list[RequestOutput], replica_id: str) -> Iterator[Event]:
        first = batch[0]
        if self._record.cached is None:  # also for a request that ended before it was admitted
            self._receipt = Receipt(*first.receipt) if first.receipt is not None else Receipt()
            self._pin = PinOutcome(first.pin) if first.pin is not None else None
            yield self._start(CachedTokens(*first.cached) if first.cached is not None else CachedTokens(), replica_id)
        elif replica_id != self._record.replica_id:
            self._record.replica_id = replica_id
            self._metrics.resumes.inc()
        for group in _grouped(batch):
            yield from self._prompt_logprobs(group)
            last = group[-1]
            is_last = last.finish_reason is not None
            token_ids = [token_id for output in group for token_id in output.token_ids]
            if token_ids or is_last:
                logprobs = [entry for output in group for entry in _positions(output.logprobs)] or None
                piece = self._text.feed(token_ids)
                if is_last and not piece.match:
                    rest = self._text.finish()
                    piece = rest._replace(text=piece.text + rest.text)
                yield from self._tokens(token_ids, logprobs, piece)
                if piece.match or is_last:
                    reason = FinishReason.STOP if piece.match else FinishReason(last.finish_reason or FinishReason.STOP)
                    yield self._finish(reason, piece.match, last.timings or (0.0, 0.0))
                    return

    def _start(self, cached: CachedTokens, replica_id: str) -> Started:
        record, metrics = self._record, self._metrics
        record.cached, record.replica_id = cached, replica_id
        metrics.prompt_tokens.inc(record.num_prompt_tokens)
        metrics.cache_queries.inc(record.num_prompt_tokens)
        metrics.cache_hits.inc(cached.total)
        for tier, num_tokens in zip(TIERS, cached, strict=True):
            if num_tokens:
                metrics.cached_tokens.labels(tier).inc(num_tokens)
        for reason, num_tokens in self._receipt.not_reused.items():
            metrics.not_reused_tokens.labels(reason).inc(num_tokens)
        return Started(self._request.request_id, record.num_prompt_tokens, cached.total, replica_id)

    def _prompt_logprobs(self, group: list[RequestOutput]) -> Iterator[Tokens]:
        positions = [entry for output in group for entry in _positions(output.prompt_logprobs)]
        for start in range(0, len(positions), MAX_EVENT_POSITIONS):
            yield Tokens((), "", None, positions[start : start + MAX_EVENT_POSITIONS])

    def _tokens(self, token_ids: list[int], logprobs: Logprobs | None, piece: OutputPiece) -> Iterator[Tokens]:
        """Nothing after a match is sent or counted."""
        num_new, record = len(token_ids), self._record
        if piece.match:
            num_new = max(0, piece.num_tokens - record.num_completion_tokens)
            token_ids, logprobs = token_ids[:num_new], logprobs and logprobs[:num_new]
            record.num_completion_tokens = min(piece.num_tokens, record.num_completion_tokens + num_new)
        else:
            record.num_completion_tokens += num_new
        if num_new:
            now_s = time.monotonic()
            if self._last_event_s:
                self._metrics.inter_token_s.observe((now_s - self._last_event_s) / num_new)
            else:
                record.ttft_s = now_s - record.arrived_s
                self._metrics.ttft_s.observe(record.ttft_s)
            self._last_event_s = now_s
            self._metrics.generation_tokens.inc(num_new)
        if num_new or piece.text:
            yield Tokens(token_ids, piece.text, logprobs)

    def _finish(self, reason: FinishReason, match: str, engine_timings: Sequence[float]) -> Finished:
        self.is_finished = True
        record, metrics = self._record, self._metrics
        total_s = time.monotonic() - record.arrived_s
        queue_s, store_wait_s = engine_timings
        metrics.successes.labels(reason.value).inc()
        metrics.request_s.observe(total_s)
        metrics.queue_s.observe(queue_s)
        metrics.store_wait_s.observe(store_wait_s)
        metrics.request_prompt_tokens.observe(record.num_prompt_tokens)
        metrics.request_output_tokens.observe(record.num_completion_tokens)
        usage = Usage(record.num_prompt_tokens, record.num_completion_tokens, record.cached or CachedTokens(), self._receipt, self._pin)
        return Finished(reason, match, usage, Timings(queue_s, store_wait_s, record.ttft_s or 0.0, total_s))


def _grouped(batch: list[RequestOutput]) -> Iterator[list[RequestOutput]]:
    """Neighbouring outputs of at most MAX_EVENT_POSITIONS positions together; a larger output stands alone."""
    if len(batch) == 1:
        yield batch
        return
    group: list[RequestOutput] = []
    num_positions = 0
    for output in batch:
        size = len(output.token_ids) + len(_positions(output.prompt_logprobs))
        if group and num_positions + size > MAX_EVENT_POSITIONS:
            yield group
            group, num_positions = [], 0
        group.append(output)
        num_positions += size
    yield group


def _positions(logprobs: Logprobs | bytes | None) -> Logprobs:
    """Whole-vocabulary logprobs (bytes) are for reading the engine directly; events carry lists."""
    return logprobs if isinstance(logprobs, list) else []


class _NoText(Detokenizer):
    """The text of a model without a tokenizer."""

    def feed(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""
