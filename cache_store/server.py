"""The store's process: one arena, one socket, one loop.

    python -m cache_store.server     reads its settings as one JSON line from stdin, prints "ready ADDRESS [PEER_ADDRESS]", and ends when
                                     stdin does

Whatever ends it but SIGKILL removes arena and socket; after a SIGKILL the next store in the same directory does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc

from cache_store.arena import file_name, is_served, remove_stale
from cache_store.assembly import opened
from cache_store.config import StoreConfig, unix_path
from cache_store.errors import StoreError, StoreRefused
from cache_store.garbage import settle
from cache_store.service import SecretInterceptor, StoreService
from cache_store.wire import MAX_MESSAGE_BYTES
from protos import cache_store_pb2_grpc

log = logging.getLogger(__name__)

_STOP_GRACE_S = 0.5
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second store must not share the port
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class Served(NamedTuple):
    address: str
    peer_address: str  # "": nothing is lent


def with_address(config: StoreConfig) -> StoreConfig:
    """The same settings with a definite address."""
    if config.address:
        return config
    return dataclasses.replace(config, address=f"unix:{Path(config.directory) / file_name('sock')}")


@contextlib.asynccontextmanager
async def serving(config: StoreConfig) -> AsyncIterator[Served]:
    """A store that serves while the context is open; yields its addresses. StoreError when it cannot start."""
    config = with_address(config)
    path = unix_path(config.address)
    remove_stale(config.directory)
    if path is not None and is_served(path):
        raise StoreRefused(f"address: somebody serves at {config.address} already")
    async with contextlib.AsyncExitStack() as stack:
        node = await stack.enter_async_context(opened(config))
        loop = asyncio.get_running_loop()
        service = StoreService(node, loop)
        stack.callback(service.close)
        server = grpc.aio.server(interceptors=[SecretInterceptor(config.secret)], options=_OPTIONS)
        cache_store_pb2_grpc.add_CacheStoreServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        if path is not None:
            _unlink(path)  # a killed store's
            stack.callback(_unlink, path)
        address = _bind(server, config.address)
        await server.start()
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        node.store.tier.grow_in_background(loop.call_soon_threadsafe)
        yield Served(address, node.peer_server.address if node.peer_server is not None else "")


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _bind(server: grpc.aio.Server, address: str) -> str:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StoreRefused(f"address: cannot listen at {address}: {error}") from error
    if unix_path(address) is not None:
        return address
    return f"{address.rpartition(':')[0]}:{port}"


async def _serve(config: StoreConfig, *, until_eof: bool) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if until_eof:
        fd = sys.stdin.fileno()

        def on_stdin() -> None:
            if not os.read(fd, 4096):
                loop.remove_reader(fd)
                stop.set()

        loop.add_reader(fd, on_stdin)
    async with serving(config) as served:
        settle()
        print(" ".join(filter(None, ["ready", *served])), flush=True)
        await stop.wait()


def run_store(config: StoreConfig, *, until_eof: bool = False) -> None:
    """Serves until SIGINT or SIGTERM, or (`until_eof`) until stdin ends; prints "ready ADDRESS [PEER_ADDRESS]" once it does. StoreError
    when it cannot."""
    os.umask(0o077)  # the socket is for this user
    asyncio.run(_serve(config, until_eof=until_eof))


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s store %(levelname)s %(message)s")
    try:
        run_store(StoreConfig.from_json(sys.stdin.readline()), until_eof=True)
    except (StoreError, ValueError) as error:
        print(f"failed {type(error).__name__} {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
