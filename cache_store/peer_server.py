"""What a store offers to stores of other nodes: its events, and its blocks' bytes. It has threads and a port of its own, so that bulk never
holds up control.

    Open -> loan and ticket -> plain socket: ticket in, bytes out
                            -> Fetch: the same over gRPC, where the plain port cannot be reached
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from cache_store.errors import StoreError, StoreRefused
from cache_store.keys import join_keys, split_keys
from cache_store.outcomes import WatchEvent
from cache_store.tickets import TICKET_BYTES, Loan, Span, Tickets, spans
from cache_store.watch import pieces
from cache_store.wire import SECRET_HEADER, TIER
from protos import cache_store_pb2 as pb
from protos import cache_store_pb2_grpc

if TYPE_CHECKING:
    from cache_store.node import StoreNode

log = logging.getLogger(__name__)

CHUNK_BYTES = 2 << 20
MAX_LOAN_S = 30.0
OPEN_WAIT_S = 1.0  # for blocks to come from this store's disk before they are lent
NUM_SENDERS = 8
NUM_HANDLERS = 96  # one per watching peer, the others for calls
STALL_S = 5.0  # a receiver that takes nothing for so long is given up
PEER_SERVICE = "mobula.cache_store.v1.PeerStore"
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
)

Result = TypeVar("Result")
Context = grpc.ServicerContext


class PeerServer(cache_store_pb2_grpc.PeerStoreServicer):
    """Made on the node's loop, which it asks for loans; `close` from there too, on a thread."""

    def __init__(self, node: StoreNode, address: str, secret: str) -> None:
        """`address` is HOST:PORT, port 0 for any. StoreRefused when it cannot listen there."""
        self._node, self._loop = node, asyncio.get_running_loop()
        self.tickets = Tickets(node.store.tier.arena, node.store.errands, self._loop)
        host = address.rpartition(":")[0]
        self._server = grpc.server(ThreadPoolExecutor(NUM_HANDLERS, "peer"), interceptors=[_SecretInterceptor(secret)], options=_OPTIONS)
        cache_store_pb2_grpc.add_PeerStoreServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        raw: dict[str, Any] = {"Fetch": grpc.unary_stream_rpc_method_handler(self._fetch)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(PEER_SERVICE, raw),))
        try:
            self.address = f"{host}:{self._server.add_insecure_port(address)}"
            self._socket = socket.create_server((host.strip("[]"), 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except (RuntimeError, OSError) as error:
            raise StoreRefused(f"peer_address: cannot listen at {address}: {error}") from error
        self._senders = ThreadPoolExecutor(NUM_SENDERS, "peer-send")
        self._acceptor = threading.Thread(target=self._accept, name="peer-accept", daemon=True)
        self._acceptor.start()
        self._server.start()

    def close(self) -> None:
        """Ends every transfer; returns within about STALL_S."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the acceptor
        self._socket.close()
        self._acceptor.join(STALL_S)
        self._senders.shutdown(wait=True, cancel_futures=True)
        self._server.stop(0.5).wait(STALL_S)

    def Open(self, request: pb.OpenRequest, context: Context) -> pb.OpenResponse:  # noqa: N802
        timeout_s = min(request.timeout_ms / 1000, MAX_LOAN_S)
        try:
            loan, checksums = self._on_loop(self._lend(split_keys(request.keys), request.layout, timeout_s))
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if loan is None:
            return pb.OpenResponse()
        return pb.OpenResponse(
            num_blocks=len(loan.blocks),
            block_bytes=loan.blocks[0].num_bytes,
            checksums=checksums,
            ticket=loan.ticket,
            port=self._socket.getsockname()[1],
        )

    def Watch(self, request: pb.WatchRequest, context: Context) -> Iterator[pb.WatchEvent]:  # noqa: N802
        events: queue.Queue[WatchEvent | None] = queue.Queue(self._node.config.watch_queue_events)
        try:
            snapshots = self._on_loop(self._subscribe(events))
        except StoreError as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        if not context.add_callback(lambda: _put_last(events)):
            _put_last(events)
        try:
            for snapshot in snapshots:
                for piece in pieces(snapshot):
                    yield _message(piece)
            while (event := events.get()) is not None:  # the end of the call puts None
                yield _message(event)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the feed with it
                self._loop.call_soon_threadsafe(self._node.feed.unsubscribe, events)

    async def _subscribe(self, events: queue.Queue[WatchEvent | None]) -> list[WatchEvent]:
        self._node.feed.add(events)
        return self._node.snapshots()

    async def _lend(self, keys: list[Any], layout: bytes, timeout_s: float) -> tuple[Loan | None, list[int]]:
        """Lends the leading blocks of the arena, after a while for those of the disk to come up."""
        store = self._node.store
        async with self._node.bringing_own(keys, layout, OPEN_WAIT_S):
            blocks = store.tier.leading(keys, layout)
            loan = self.tickets.lend(blocks, timeout_s) if blocks else None
        store.tier.touch(blocks)
        return loan, [checksum for block in blocks for checksum in block.checksums]

    def _on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(OPEN_WAIT_S + STALL_S)

    def _fetch(self, ticket: bytes, context: Context) -> Iterator[bytes]:
        """The bytes of a loan, in chunks."""
        loan = self.tickets.redeem(ticket)
        if loan is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "the ticket is not known, was used, or is too old")
        assert loan is not None
        arena, num_sent = self._node.store.tier.arena, 0
        try:
            for span in spans(loan.blocks, CHUNK_BYTES):
                for start in range(0, span.num_bytes, CHUNK_BYTES):
                    chunk = arena.read(span.offset + start, min(CHUNK_BYTES, span.num_bytes - start))
                    if not self._holds(loan, span):
                        context.abort(grpc.StatusCode.ABORTED, "the loan has ended")
                    num_sent += len(chunk)
                    yield chunk
        finally:
            self.tickets.end(loan, num_sent)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
                self._senders.submit(self._send, connection)
            except (OSError, RuntimeError):  # closed
                return

    def _send(self, connection: socket.socket) -> None:
        """Serves one ticket over a plain socket."""
        loan, num_sent = None, 0
        with connection:
            try:
                connection.settimeout(STALL_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                loan = self.tickets.redeem(connection.recv(TICKET_BYTES))
                for span in spans(loan.blocks, CHUNK_BYTES) if loan is not None else ():
                    if loan is None or not self._holds(loan, span):
                        break
                    with self._node.store.tier.arena.view(span.offset, span.num_bytes) as data:
                        connection.sendall(data)
                    num_sent += span.num_bytes
            except OSError as error:
                log.info("a peer has broken off a transfer: %s", error)
            finally:
                if loan is not None:
                    self.tickets.end(loan, num_sent)

    def _holds(self, loan: Loan, span: Span) -> bool:
        """Whether a span is still what was lent."""
        return time.monotonic() <= loan.deadline_s and all(map(self.tickets.is_whole, span.blocks))


def _put_last(events: queue.Queue[WatchEvent | None]) -> None:
    """Wakes the handler of a watcher that has gone."""
    while True:
        try:
            events.put_nowait(None)
            return
        except queue.Full:
            with contextlib.suppress(queue.Empty):
                events.get_nowait()


def _message(event: WatchEvent) -> pb.WatchEvent:
    return pb.WatchEvent(
        sequence=event.sequence, epoch=event.epoch, tier=TIER[event.tier], added=join_keys(event.added), removed=join_keys(event.removed)
    )


class _SecretInterceptor(grpc.ServerInterceptor):
    """Lets calls pass that carry the cluster's secret."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        given = str(dict(details.invocation_metadata or ()).get(SECRET_HEADER, ""))
        handler = continuation(details)
        if hmac.compare_digest(given.encode(), self._secret) or handler is None:
            return handler

        def refuse(request: object, context: Context) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{SECRET_HEADER} is missing or wrong")

        return grpc.unary_stream_rpc_method_handler(refuse) if handler.response_streaming else grpc.unary_unary_rpc_method_handler(refuse)
