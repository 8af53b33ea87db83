"""Blocks from another process's store, against a plain socket with the same copy and the same hash; and control while bulk is under way."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cache_store.checksums import is_intact, part_checksums
from cache_store.client import StoreClient
from cache_store.config import StoreConfig
from cache_store.keys import BlockKey, chain_keys
from cache_store.process import StoreProcess
from cache_store.tiers.peer import Peer
from tests.bench.store_bench import LAYOUT, ROOT, Row, holder

NUM_BLOCKS = 256  # 64 MiB
ROUNDS = 15
SMALL_CALLS = 400
TIMEOUT_S = 30.0

# Sends a file of shared memory to whoever connects, in one go.
SENDER = """
import mmap, socket, sys
with open(sys.argv[1], "r+b") as file:
    data = memoryview(mmap.mmap(file.fileno(), 0))
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    connection, _ = server.accept()
    with connection:
        connection.sendall(data)
        connection.recv(1)
"""


@contextmanager
def warm_memory(num_bytes: int) -> Iterator[tuple[Path, memoryview]]:
    """A file in shared memory, all of it touched."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="peer-bench-") as file:
        file.write(os.urandom(1 << 20) * (num_bytes >> 20))
        file.flush()
        with mmap.mmap(file.fileno(), num_bytes) as mapping, memoryview(mapping) as view:
            yield Path(file.name), view


@contextmanager
def sender(path: Path) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", SENDER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield int(process.stdout.readline())
        process.kill()


def receive_raw(port: int, views: list[memoryview], expected: list[bytes]) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for view, checksums in zip(views, expected, strict=True):
            filled = 0
            while filled < len(view):
                filled += connection.recv_into(view[filled:])
            assert is_intact(view, checksums)
        connection.sendall(b"!")


def receive(peer: Peer, keys: list[BlockKey], views: list[memoryview]) -> None:
    arrived: list[int] = []
    peer.fetch(keys, LAYOUT.digest(), views, lambda position, sums: arrived.append(position) if sums else None, TIMEOUT_S)
    assert len(arrived) == len(keys)


async def fill(store: StoreProcess, process: tuple[int, int], keys: list[BlockKey], source: memoryview) -> list[bytes]:
    """Writes the blocks into the store; their checksums."""
    async with StoreClient(store.address, "bench") as client:
        attached = await client.attach(LAYOUT, [process], "bench")
        deadline_s = time.monotonic() + TIMEOUT_S
        while (stat := await client.stat()).ready_bytes < stat.total_bytes:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.05)
        reserved = await client.reserve(keys, [ROOT, *keys[:-1]], 600.0)
        size, blocks = LAYOUT.block_bytes, []
        with open(attached.arena_path, "r+b") as file, mmap.mmap(file.fileno(), attached.arena_bytes) as arena:  # noqa: ASYNC230
            for number, (key, slot) in enumerate(zip(keys, reserved.slots, strict=True)):
                data = source[number * size : (number + 1) * size]
                arena[attached.data_offset + slot.offset : attached.data_offset + slot.offset + size] = bytes(data)
                blocks.append((key, range(LAYOUT.num_parts), part_checksums(data, LAYOUT.num_parts)))
        await client.commit(reserved.lease_id, blocks)
        return [checksums for _, _, checksums in blocks]


def rates(actions: dict[str, Callable[[], None]], num_bytes: int) -> dict[str, list[float]]:
    """Bytes/s per action and round, interleaved; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(ROUNDS + 1):
        for name, action in actions.items():
            begun_s = time.perf_counter()
            action()
            found[name].append(num_bytes / (time.perf_counter() - begun_s))
    return {name: values[1:] for name, values in found.items()}


def ratio(values: list[float], others: list[float]) -> float:
    """Median of the rounds' ratios: what else runs on the machine hits both sides of a round."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


async def small_calls(address: str, num_calls: int) -> list[float]:
    async with StoreClient(address, "bench") as client:
        times = []
        for _ in range(num_calls):
            begun_s = time.perf_counter()
            await client.stat()
            times.append(time.perf_counter() - begun_s)
        return times


def control_under_bulk(store: StoreProcess, fetch: Callable[[], None]) -> Row:
    """Small calls to the store that serves a bulk fetch without a pause."""
    stop = threading.Event()

    def bulk() -> None:
        while not stop.is_set():
            fetch()

    thread = threading.Thread(target=bulk)
    thread.start()
    try:
        times = sorted(asyncio.run(small_calls(store.address, SMALL_CALLS)))
    finally:
        stop.set()
        thread.join()
    p99_ms = times[int(0.99 * len(times))] * 1e3
    return ("store: small calls while a bulk fetch runs, p99", p99_ms, "ms", "< 10", p99_ms < 10)


def main() -> list[Row]:
    keys = chain_keys(ROOT, list(range(NUM_BLOCKS * LAYOUT.block_size)), LAYOUT.block_size)
    size, num_bytes = LAYOUT.block_bytes, NUM_BLOCKS * LAYOUT.block_bytes
    config = StoreConfig(memory_bytes=5 * num_bytes // 4, secret="bench", peer_address="127.0.0.1:0")
    with ExitStack() as stack:
        process = stack.enter_context(holder())
        store = stack.enter_context(StoreProcess(config))
        store.start()
        path, source = stack.enter_context(warm_memory(num_bytes))
        _, target = stack.enter_context(warm_memory(num_bytes))
        port = stack.enter_context(sender(path))
        expected = asyncio.run(fill(store, process, keys, source))
        views = [stack.enter_context(target[number * size : (number + 1) * size]) for number in range(NUM_BLOCKS)]
        ticket, stream = Peer(store.peer_address, "bench"), Peer(store.peer_address, "bench")
        stack.callback(ticket.close)
        stack.callback(stream.close)
        stream._receiver._no_plain_until_s = float("inf")
        found = rates(
            {
                "raw": lambda: receive_raw(port, views, expected),
                "ticket": lambda: receive(ticket, keys, views),
                "stream": lambda: receive(stream, keys, views),
            },
            num_bytes,
        )
        bulk = control_under_bulk(store, lambda: receive(ticket, keys, views))
    rows: list[Row] = [bulk]
    for name, what, budget in (("ticket", "by ticket", 80), ("stream", "over gRPC", 50)):
        share = 100 * ratio(found[name], found["raw"])
        rows.append((f"store: fetch {what}", share, "% of a socket", f">= {budget}", share >= budget))
    gain = ratio(found["ticket"], found["stream"])
    rows.append(("store: fetch by ticket", gain, "x gRPC", ">= 1.3", gain >= 1.3))
    rows.append(("store: a plain socket with the same copy and hash", statistics.median(found["raw"]) / 1e9, "GB/s", "printed", True))
    return rows


if __name__ == "__main__":
    for name, value, unit, budget, ok in main():
        print(f"{name:55} {value:10.4g} {unit:14} {budget:10} {'ok' if ok else 'MISSED'}")
