"""A peer that says it has blocks and then behaves badly: on real sockets, with the real protocol."""

from __future__ import annotations

import contextlib
import socket
import threading
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

from cache_store.checksums import part_checksums
from cache_store.keys import join_keys, split_keys
from cache_store.peer_server import PEER_SERVICE
from protos import cache_store_pb2 as pb
from protos import cache_store_pb2_grpc
from tests.cache_store.arena_user import content
from tests.cache_store.conftest import LAYOUT, SLOT_BYTES

BEHAVIOURS = ("good", "corrupt", "dies midway", "stalls", "has nothing", "lies about sizes", "refuses")


class FakePeer(cache_store_pb2_grpc.PeerStoreServicer):
    """Claims `keys`. `good_blocks` blocks are sent well before it does what `behaviour` says. A context manager."""

    def __init__(self, keys: Sequence[bytes], behaviour: str, *, plain: bool, good_blocks: int = 2) -> None:
        self.keys, self.behaviour, self.good_blocks = list(keys), behaviour, good_blocks
        self.num_opened = 0
        self._asked: list[bytes] = []
        self._ended = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(16))
        cache_store_pb2_grpc.add_PeerStoreServicer_to_server(self, self._server)
        raw = {"Fetch": grpc.unary_stream_rpc_method_handler(self._fetch)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(PEER_SERVICE, raw),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._socket = socket.create_server(("127.0.0.1", 0)) if plain else None
        self._threads = [threading.Thread(target=self._accept, daemon=True)] if plain else []

    def __enter__(self) -> FakePeer:
        self._server.start()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._ended.set()
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        self._server.stop(0).wait(5.0)
        for thread in self._threads:
            thread.join(5.0)

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchEvent]:  # noqa: N802
        yield pb.WatchEvent(sequence=1, epoch="fake", tier=pb.DRAM, added=join_keys(self.keys))
        context.add_callback(self._ended.set)
        self._ended.wait(60.0)

    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenResponse:  # noqa: N802
        self.num_opened += 1
        if self.behaviour == "refuses":
            context.abort(grpc.StatusCode.INTERNAL, "not today")
        self._asked = [] if self.behaviour == "has nothing" else list(split_keys(request.keys))
        checksums = array("Q")
        for key in self._asked:
            checksums.frombytes(part_checksums(content(key, SLOT_BYTES), LAYOUT.num_parts))
        return pb.OpenResponse(
            num_blocks=len(self._asked),
            block_bytes=SLOT_BYTES * (2 if self.behaviour == "lies about sizes" else 1),
            checksums=checksums,
            ticket=b"t" * 16,
            port=self._socket.getsockname()[1] if self._socket else 0,
        )

    def _pieces(self) -> Iterator[bytes]:
        for number, key in enumerate(self._asked):
            data = content(key, SLOT_BYTES)
            if self.behaviour == "good" or number < self.good_blocks:
                yield data
            elif self.behaviour == "corrupt":
                yield data[:-1] + bytes([data[-1] ^ 1])
            else:
                yield data[: SLOT_BYTES // 2]
                if self.behaviour == "stalls":
                    self._ended.wait(60.0)
                return

    def _fetch(self, ticket: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        assert ticket == b"t" * 16
        context.add_callback(self._ended.set)
        yield from self._pieces()

    def _accept(self) -> None:
        assert self._socket
        while not self._ended.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10.0)
                assert connection.recv(16, socket.MSG_WAITALL) == b"t" * 16
                with contextlib.suppress(ConnectionError):  # whoever has seen enough hangs up
                    for piece in self._pieces():
                        connection.sendall(piece)
