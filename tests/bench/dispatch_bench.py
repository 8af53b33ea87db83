"""Plan dispatch: from `submit` of a plan of decode rows to the last rank's answer, with a forward pass that does nothing.

Measured in turn with bare sockets: the same bytes to as many processes that read them and send a few bytes back.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

from tests.bench.rows import Row
from workers.config import WorkerConfig
from workers.group import GroupListener, RankGroup
from workers.local import spawn_ranks
from workers.step import NewRow, SamplingSettings, StepPlan, StepRow
from workers.wire import encode
from workers.worker import ECHO

BUDGET_US = 150.0
SECRET = "bench"
BLOCK_SIZE = 16
NUM_WARM_UP = 300
NUM_STEPS = 1000
NUM_RUNS = 5


def echo(link: socket.socket, num_bytes: int) -> None:
    """A rank without anything: reads a message, sends eight bytes."""
    buffer = bytearray(num_bytes)
    with link:
        while True:
            read = 0
            while read < num_bytes:
                got = link.recv_into(memoryview(buffer)[read:])
                if not got:
                    return
                read += got
            link.sendall(b"12345678")


@contextlib.contextmanager
def bare_ranks(world_size: int, num_bytes: int) -> Iterator[list[socket.socket]]:
    context = multiprocessing.get_context("fork")
    links, processes = [], []
    for _ in range(world_size):
        mine, theirs = socket.socketpair()
        process = context.Process(target=echo, args=(theirs, num_bytes), daemon=True)
        process.start()
        theirs.close()
        links.append(mine)
        processes.append(process)
    try:
        yield links
    finally:
        for link in links:
            link.shutdown(socket.SHUT_RDWR)
            link.close()
        for process in processes:
            process.terminate()
            process.join(10)


def measure_bare(links: list[socket.socket], num_bytes: int) -> list[float]:
    """Microseconds of every round trip to all of them."""
    message = bytes(num_bytes)
    times_us = []
    for _ in range(NUM_WARM_UP + NUM_STEPS):
        started_s = time.perf_counter()
        for link in links:
            link.sendall(message)
        for link in links:
            link.recv(8, socket.MSG_WAITALL)
        times_us.append((time.perf_counter() - started_s) * 1e6)
    return times_us[NUM_WARM_UP:]


def measure(group: RankGroup, num_rows: int) -> list[float]:
    """Microseconds of every step of a steady decode of `num_rows` rows; each row gets a new page every BLOCK_SIZE steps."""
    first = NewRow(0, b"\0" * 64, 16, 0, [1], SamplingSettings())
    rows_in = [first._replace(row_id=row_id) for row_id in range(num_rows)]
    times_us = []
    sequence = 0
    for step in range(NUM_WARM_UP + NUM_STEPS):
        rows = [StepRow(row_id, 1, 0, 0, [step] if (row_id + step) % BLOCK_SIZE == 0 else []) for row_id in range(num_rows)]
        sequence += 1  # noqa: SIM113 - counts on over calls
        plan = StepPlan(sequence, [], rows_in if step == 0 else [], rows, [], [])
        started_s = time.perf_counter()
        group.submit(plan)
        finished = group.poll(10.0)
        elapsed_s = time.perf_counter() - started_s
        assert len(finished) == 1
        assert finished[0].rows[-1].token_ids == [num_rows - 1]
        if step >= NUM_WARM_UP:
            times_us.append(elapsed_s * 1e6)
    return times_us


class Figures(NamedTuple):
    """Microseconds, each the median of NUM_RUNS interleaved runs."""

    p50: float
    p99: float
    bare_p50: float


def run(world_size: int, all_num_rows: list[int]) -> dict[int, Figures]:
    """By number of rows."""
    config = WorkerConfig(model="none", tensor_parallel_size=world_size, device="cpu")
    figures: dict[int, list[Figures]] = {num_rows: [] for num_rows in all_num_rows}
    with (
        GroupListener(world_size, secret=SECRET) as listener,
        spawn_ranks(listener.address, world_size, SECRET, parts=ECHO) as ranks,
        listener.accept(60.0, check=ranks.check) as group,
    ):
        for _ in range(NUM_RUNS):
            for num_rows in all_num_rows:
                group.load(config, lambda *progress: None, timeout_s=60.0)
                times_us = sorted(measure(group, num_rows))
                rows = [StepRow(row_id, 1, 0, 0, [1] if row_id % BLOCK_SIZE == 0 else []) for row_id in range(num_rows)]
                num_bytes = len(encode(StepPlan(1, [], [], rows, [], [])))
                with bare_ranks(world_size, num_bytes) as links:
                    bare_us = statistics.median(measure_bare(links, num_bytes))
                figures[num_rows].append(Figures(times_us[len(times_us) // 2], times_us[len(times_us) * 99 // 100], bare_us))
    return {num_rows: Figures(*(statistics.median(column) for column in zip(*runs, strict=True))) for num_rows, runs in figures.items()}


def main() -> list[Row]:
    rows: list[Row] = []
    for world_size in (2, 4):
        for num_rows, figures in run(world_size, [64, 256]).items():
            name, of = f"plan dispatch, {num_rows} rows, tp {world_size}", "bare sockets, the same bytes"
            has_budget = (world_size, num_rows) == (2, 64)
            ok, budget = figures.p50 <= BUDGET_US or not has_budget, f"<= {BUDGET_US:g} us" if has_budget else "printed"
            rows.append(Row(f"{name}, p50", figures.p50, "us", budget, ok, figures.bare_p50, of))
            rows.append(Row(f"{name}, p99", figures.p99, "us", "printed", True, figures.bare_p50, of, is_compared=False))
    return rows
