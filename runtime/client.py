"""A small blocking client of the inference service, for the command line, the demo and tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from runtime.api_keys import bearer
from runtime.errors import MobulaError
from runtime.request import TIERS


class RemoteError(MobulaError):
    """The service answered with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code


class Completion(NamedTuple):
    """One finished request."""

    token_ids: list[int]
    text: str
    finish_reason: str
    usage: dict[str, Any]
    timings: dict[str, float]
    replica_id: str

    def to_json(self) -> str:
        """The line that `mobula generate --json` prints."""
        fields = self._asdict()
        del fields["replica_id"]
        return json.dumps(fields)


def describe_usage(usage: pb.Usage) -> dict[str, Any]:
    """`usage` as the command line prints it: every tier is there, 0 when 0; of the reasons those that occurred; a pin's outcome
    where one was asked for."""
    pin = {} if usage.pin == pb.PIN_OUTCOME_UNSPECIFIED else {"pin": pb.PinOutcome.Name(usage.pin).removeprefix("PIN_").lower()}
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "cached_tokens": usage.num_cached_tokens,
        "cached_tokens_by_tier": {tier: usage.cached_tokens_by_tier.get(tier, 0) for tier in TIERS},
        "computed_tokens": usage.num_computed_tokens,
        "bytes_loaded": usage.bytes_loaded,
        "not_reused_tokens_by_reason": dict(usage.not_reused_tokens_by_reason),
        **pin,
    }


class InferenceClient:
    """with-able; one channel."""

    def __init__(self, address: str, *, api_key: str = "", max_message_bytes: int = 16 << 20) -> None:
        limits = [("grpc.max_receive_message_length", max_message_bytes), ("grpc.max_send_message_length", max_message_bytes)]
        self._channel = grpc.insecure_channel(address, options=limits)
        self._metadata = bearer(api_key)
        self._stub: Any = rpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def stream(self, request: pb.GenerateRequest, timeout_s: float | None = None) -> Iterator[pb.GenerateEvent]:
        """Events as they come. RemoteError when the request fails; leaving the iterator early cancels it."""
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise _remote_error(error) from error
        finally:
            call.cancel()

    def generate(self, request: pb.GenerateRequest, timeout_s: float | None = None) -> Completion:
        """Runs one request to its end."""
        return collect(self.stream(request, timeout_s))

    def abort(self, request_id: str, timeout_s: float = 10.0) -> pb.AbortResponse:
        response: pb.AbortResponse = self._unary("Abort", pb.AbortRequest(request_id=request_id), timeout_s)
        return response

    def models(self, timeout_s: float = 10.0) -> pb.ListModelsResponse:
        response: pb.ListModelsResponse = self._unary("ListModels", pb.ListModelsRequest(), timeout_s)
        return response

    def status(self, timeout_s: float = 10.0) -> pb.GetStatusResponse:
        response: pb.GetStatusResponse = self._unary("GetStatus", pb.GetStatusRequest(), timeout_s)
        return response

    def list_pins(self, timeout_s: float = 10.0) -> pb.ListPinsResponse:
        response: pb.ListPinsResponse = self._unary("ListPins", pb.ListPinsRequest(), timeout_s)
        return response

    def unpin(self, pin_ids: Iterable[str] = (), *, everything: bool = False, timeout_s: float = 10.0) -> pb.UnpinResponse:
        """Of the caller's tenant: those named, or everything."""
        response: pb.UnpinResponse = self._unary("Unpin", pb.UnpinRequest(pin_ids=pin_ids, all=everything), timeout_s)
        return response

    def _unary(self, method: str, request: Any, timeout_s: float) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _remote_error(error) from error


def _remote_error(error: Any) -> RemoteError:
    return RemoteError(error.code(), error.details())


def collect(events: Iterator[pb.GenerateEvent]) -> Completion:
    """Folds a stream of events into its completion."""
    token_ids: list[int] = []
    text: list[str] = []
    replica_id = ""
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "started":
            replica_id = event.started.replica_id
        elif kind == "tokens":
            token_ids.extend(event.tokens.token_ids)
            text.append(event.tokens.text)
        elif kind == "finished":
            return completion_of(token_ids, "".join(text), event.finished, replica_id)
    raise MobulaError("the stream ended without a Finished event")


def completion_of(token_ids: list[int], text: str, finished: pb.Finished, replica_id: str) -> Completion:
    usage, timings = finished.usage, finished.timings
    return Completion(
        token_ids=token_ids[: usage.num_completion_tokens],
        text=text,
        finish_reason=pb.FinishReason.Name(finished.reason).lower(),
        usage=describe_usage(usage),
        timings={name: getattr(timings, name) for name in ("queue_s", "ttft_s", "store_wait_s", "total_s")},
        replica_id=replica_id,
    )
