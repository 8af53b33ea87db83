"""The one place where an error becomes a gRPC status: `runtime.errors.STATUS` says which."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from cache_store.errors import MobulaError
from runtime.errors import Overloaded, status_of

log = logging.getLogger(__name__)

RETRY_PUSHBACK = "grpc-retry-pushback-ms"
_MAX_DETAIL_CHARS = 2000  # details travel in trailing metadata, which clients limit to 8 KiB

Behaviour = Callable[[Any, Any], Awaitable[Any]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of one service, all of which are coroutines."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        if handler.response_streaming:
            return handler._replace(unary_stream=_translated(handler.unary_stream))
        return handler._replace(unary_unary=_translated(handler.unary_unary))


def _translated(behaviour: Behaviour) -> Behaviour:
    async def run(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except MobulaError as error:
            metadata = ((RETRY_PUSHBACK, str(error.retry_after_ms)),) if isinstance(error, Overloaded) else ()
            await context.abort(status_of(error)[0], str(error)[:_MAX_DETAIL_CHARS], metadata)
        except Exception:
            error_id = secrets.token_hex(4)
            log.exception("error %s", error_id)
            await context.abort(grpc.StatusCode.INTERNAL, f"internal error {error_id}: the server's log says more")

    return run
