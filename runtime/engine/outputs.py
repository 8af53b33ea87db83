"""What results mean: tokens that count, ends that were found, blocks that are now complete, and what front doors are told.

A block is published with the result of the step that wrote its last position, never earlier: until then its bytes are a promise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from runtime.engine.block_manager import BlockManager, Published
from runtime.engine.frames import RequestOutput
from runtime.engine.live import LiveRequest, Phase
from runtime.engine.scheduler import Launched
from runtime.request import CachedTokens, FinishReason, Receipt
from workers.step import RowResult, StepResult


class Outputs:
    """Owned by the engine's thread. `apply` results in the order of their steps; `take` what has gathered for each stream."""

    def __init__(self, blocks: BlockManager, *, publish: bool = True) -> None:
        self._blocks = blocks
        self._block_size = blocks.block_size
        self._publish_blocks = publish
        self._by_stream: dict[int, list[RequestOutput]] = defaultdict(list)

    def apply(self, launched: Launched, result: StepResult, now_s: float) -> list[LiveRequest]:
        """Confirms one launched step. Returns the requests that ended with it, which the caller removes from the batch."""
        finished = []
        block_size, by_stream, publish = self._block_size, self._by_stream, self._publish_blocks
        for request, step_row, row in zip(launched.requests, launched.plan.rows, result.rows, strict=True):
            request.num_in_flight -= 1
            phase = request.phase
            if request.num_void:
                request.num_void -= 1
                continue
            if phase is Phase.FINISHED:
                continue  # launched before its end was known
            request.num_confirmed += step_row[1]
            reason = None
            tokens: list[int] = row.token_ids
            if tokens:
                tokens, reason = _keep(request, tokens)
            if publish and phase is Phase.RUNNING and request.num_confirmed // block_size > request.num_published:
                self._publish(request)
            if request.first_output_sent and reason is None and row.prompt_logprobs is None and row.logprobs is None:
                output = RequestOutput(request.request.request_id, tokens) if tokens else None
            else:
                output = self._full_output(request, row, tokens, reason, now_s)
            if output is not None:
                by_stream[request.request.stream].append(output)
            if reason is not None:
                finished.append(request)
        self._blocks.confirm(result.sequence)
        return finished

    def admitted(self, launched: Launched) -> None:
        """The first output of requests that a step admits: what they reuse. It is on its way to the client while the prompt is computed,
        unless the step waits for what they reuse: a copy may fail."""
        for request in launched.admitted if not launched.plan.waits else ():
            if not request.first_output_sent:  # else it was preempted, and is admitted again
                first = self._complete(request, RequestOutput(request.request.request_id, []), None, 0.0)
                self._by_stream[request.request.stream].append(first)

    def end(self, request: LiveRequest, now_s: float, *, reason: FinishReason | None = None, error: Sequence[str] | None = None) -> None:
        """The last output of a request that ends for another reason than its own tokens."""
        self._emit(request, RequestOutput(request.request.request_id, []), reason, now_s, error)

    def refuse(self, stream: int, request_id: str, error: Sequence[str]) -> None:
        """The only output of a request that never became live."""
        self._by_stream[stream].append(RequestOutput(request_id, [], error=list(error)))

    def take(self) -> dict[int, list[RequestOutput]]:
        gathered, self._by_stream = self._by_stream, defaultdict(list)
        return gathered

    def _full_output(
        self, request: LiveRequest, row: RowResult, tokens: list[int], reason: FinishReason | None, now_s: float
    ) -> RequestOutput | None:
        """An output with more than tokens; None when there is nothing to tell (the middle of a prompt)."""
        logprobs = row.logprobs
        if logprobs is not None and len(tokens) < len(row.token_ids):
            logprobs = logprobs[: len(logprobs) // len(row.token_ids) * len(tokens)]
        if request.request.sampling.num_prompt_logprobs is not None:
            request.num_prompt_scored = min(request.num_confirmed + 1, request.num_prompt)
        if not tokens and not row.prompt_logprobs and reason is None:
            return None
        output = RequestOutput(request.request.request_id, tokens, logprobs or None, row.prompt_logprobs or None)
        return self._complete(request, output, reason, now_s)

    def _emit(
        self, request: LiveRequest, output: RequestOutput, reason: FinishReason | None, now_s: float, error: Sequence[str] | None
    ) -> None:
        completed = self._complete(request, output, reason, now_s)
        if error is not None:
            completed = completed._replace(error=list(error))
        self._by_stream[request.request.stream].append(completed)

    def _complete(self, request: LiveRequest, output: RequestOutput, reason: FinishReason | None, now_s: float) -> RequestOutput:
        """Adds what the first and the last output carry."""
        if not request.first_output_sent:
            request.first_output_sent = True
            cached, receipt = list(request.cached or CachedTokens()), list(request.receipt or Receipt())
            output = output._replace(cached=cached, receipt=receipt, pin=request.pin.value if request.pin else None)
        if reason is not None:
            output = output._replace(finish_reason=reason.value, timings=_timings(request, now_s))
        return output

    def _publish(self, request: LiveRequest) -> None:
        """Blocks whose last position is confirmed. Their tokens are all known: a position's token is known before it is computed."""
        keys = request.extend_keys(self._block_size)
        for index in range(request.num_published, request.num_confirmed // self._block_size):
            parent = keys[index - 1] if index else request.root
            self._blocks.publish(request.pages[index], Published(keys[index], parent, index))
        request.num_published = request.num_confirmed // self._block_size


def _keep(request: LiveRequest, new_tokens: list[int]) -> tuple[list[int], FinishReason | None]:
    """Appends new tokens up to the request's end. Returns those that count, and the end where it was found."""
    tokens, limit, ends = request.tokens, request.limit, request.request.end_token_ids
    for count, token in enumerate(new_tokens, start=1):
        if len(tokens) >= limit:  # max_tokens is 0: the prompt alone was wanted
            return new_tokens[: count - 1], FinishReason.LENGTH
        tokens.append(token)
        if token in ends:
            return new_tokens[:count], FinishReason.STOP
        if len(tokens) >= limit:
            return new_tokens[:count], FinishReason.LENGTH
    return new_tokens, None


def _timings(request: LiveRequest, now_s: float) -> list[float]:
    """[queue_s, store_wait_s]: from arrival to first admission, without and with only the wait for the store."""
    admitted_s = request.admitted_s if request.admitted_s is not None else now_s
    return [max(0.0, admitted_s - request.arrived_s - request.store_wait_s), request.store_wait_s]
