"""The one place where a caller is let in, and the one where an error becomes a gRPC status: `runtime.errors.STATUS` says which."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cache_store.errors import MobulaError
from protos import inference_pb2
from runtime.api_keys import Tenants
from runtime.errors import BadRequest, Overloaded, Unauthenticated, status_of
from runtime.frontdoor.malformed import describe_malformed

log = logging.getLogger(__name__)

RETRY_PUSHBACK = "grpc-retry-pushback-ms"
OPEN_TO_ALL = "/grpc.health.v1.Health/"  # load balancers have no key
_METHODS = frozenset(inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods_by_name)
_MAX_DETAIL_CHARS = 2000  # details travel in trailing metadata, which clients limit to 8 KiB

Behaviour = Callable[[Any, Any], Awaitable[Any]]
OnFailure = Callable[[str, str], None]  # method, label of the reason


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every method but health to callers without a key that is known. The handler asks `Tenants` again whose the call is."""

    def __init__(self, tenants: Tenants, on_failure: OnFailure) -> None:
        self._tenants = tenants
        self._on_failure = on_failure

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if not handler_call_details.method.startswith(OPEN_TO_ALL):
            try:
                self._tenants.tenant_of(handler_call_details.invocation_metadata)
            except Unauthenticated as error:
                code, label = status_of(error)
                self._on_failure(_label_of(handler_call_details.method), label)
                return _refusal(code, str(error))
        return await continuation(handler_call_details)


def _label_of(method: str) -> str:
    """For metrics: whoever calls without a key must not be able to make up labels."""
    name = method.rpartition("/")[2]
    return name if name in _METHODS else "other"


def _refusal(code: grpc.StatusCode, details: str) -> Any:
    async def refuse(payload: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(code, details)

    return grpc.unary_unary_rpc_method_handler(refuse)  # any kind of call can be answered like this


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of one service, all of which are coroutines that take one message."""

    def __init__(self, service: str, on_failure: OnFailure) -> None:
        self._prefix = f"/{service}/"
        self._on_failure = on_failure

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefix):
            return handler
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        answering = self._answering(getattr(handler, kind), handler.request_deserializer, method.removeprefix(self._prefix))
        # gRPC's own answer to bytes that are no message names no field, so they are parsed within the handler.
        return handler._replace(**{kind: answering, "request_deserializer": None})

    def _answering(self, behaviour: Behaviour, parse: Callable[[bytes], Any], method: str) -> Behaviour:
        async def run(payload: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await behaviour(_parsed(payload, parse), context)
            except grpc.aio.AbortError:
                raise
            except MobulaError as error:
                code, label = status_of(error)
                self._on_failure(method, label)
                metadata = ((RETRY_PUSHBACK, str(error.retry_after_ms)),) if isinstance(error, Overloaded) else ()
                await context.abort(code, str(error)[:_MAX_DETAIL_CHARS], metadata)
            except Exception as error:
                error_id = secrets.token_hex(4)
                log.exception("error %s", error_id)
                self._on_failure(method, status_of(error)[1])
                await context.abort(grpc.StatusCode.INTERNAL, f"internal error {error_id}: the server's log says more")

        return run


def _parsed(payload: bytes, parse: Callable[[bytes], Any]) -> Any:
    """`parse` is `FromString` of the message's class."""
    try:
        return parse(payload)
    except DecodeError as error:
        raise BadRequest(describe_malformed(payload, parse.__self__)) from error  # type: ignore[attr-defined]
