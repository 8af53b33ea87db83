"""How blocks' bytes come from a peer: over a plain socket, straight into their places, or as gRPC chunks where that cannot be reached."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import grpc

from protos import cache_store_pb2 as pb

log = logging.getLogger(__name__)

FETCH = "/mobula.cache_store.v1.PeerStore/Fetch"
CONNECT_TIMEOUT_S = 1.0
STALL_S = 2.0  # a sender that sends nothing for so long is given up
RETRY_PLAIN_AFTER_S = 60.0


class Receiver:
    """Used by several threads at once; it keeps nothing but whether plain sockets work."""

    def __init__(self, channel: grpc.Channel, host: str, metadata: tuple[tuple[str, str], ...]) -> None:
        self._host, self._metadata = host, metadata
        self._fetch: Any = channel.unary_stream(FETCH)
        self._no_plain_until_s = 0.0

    def receive(self, opened: pb.OpenResponse, views: Sequence[memoryview], deadline_s: float) -> Generator[int, None, None]:
        """Fills the views one after the other; yields the position of each that is full. OSError or grpc.RpcError when the sender stops,
        stalls, or the deadline has come."""
        if not views:
            return
        connection = self._connect(opened.port) if opened.port else None
        if connection is None:
            yield from self._receive_chunks(opened.ticket, views, deadline_s)
            return
        with connection:
            connection.sendall(opened.ticket)
            for position, view in enumerate(views):
                _fill(connection, view, deadline_s)
                yield position

    def _connect(self, port: int) -> socket.socket | None:
        if time.monotonic() < self._no_plain_until_s:
            return None
        try:
            connection = socket.create_connection((self._host, port), CONNECT_TIMEOUT_S)
        except OSError as error:
            log.info("no plain connection to %s:%d (%s): fetching over gRPC", self._host, port, error)
            self._no_plain_until_s = time.monotonic() + RETRY_PLAIN_AFTER_S
            return None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _receive_chunks(self, ticket: bytes, views: Sequence[memoryview], deadline_s: float) -> Iterator[int]:
        """The stream knows no stall, only its deadline: it is the slower way anyhow."""
        stream = self._fetch(ticket, timeout=max(0.01, deadline_s - time.monotonic()), metadata=self._metadata)
        position = offset = 0
        try:
            for chunk in stream:
                data = memoryview(chunk)
                while data:
                    if position == len(views):
                        raise OSError("it sends more than was asked for")
                    view = views[position]
                    length = min(len(data), len(view) - offset)
                    view[offset : offset + length] = data[:length]
                    data, offset = data[length:], offset + length
                    if offset == len(view):
                        yield position
                        position, offset = position + 1, 0
        finally:
            stream.cancel()
        if position < len(views):
            raise OSError(f"it has sent {position} of {len(views)} blocks")


def _fill(connection: socket.socket, view: memoryview, deadline_s: float) -> None:
    filled = 0
    while filled < len(view):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the transfer has taken too long")
        connection.settimeout(min(STALL_S, left_s))
        received = connection.recv_into(view[filled:])
        if not received:
            raise ConnectionError("it has broken off the transfer")
        filled += received
