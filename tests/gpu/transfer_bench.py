"""Page copies between the GPU and an arena in /dev/shm, hashes and all: GB/s by page size, beside a bare DMA of pinned memory.

python tests/gpu/transfer_bench.py
"""

from __future__ import annotations

import os
import select
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from cache_store.config import GRANULE_BYTES
from cache_store.keys import Layout
from workers.kv.layout import PageLayout
from workers.kv.pool import PagePool
from workers.kv.transfer import PageCopier
from workers.step import ArenaSpec, BlockCopy, CopyResult

ARENA_BYTES = 1 << 30
MAX_PAGES = 4096  # moved per measurement
NUM_RUNS = 5
GENERATION = 1

Row = tuple[str, float, str, float | None, bool]


def measure(path: Path, page_bytes: int, part_bytes: int) -> tuple[float, float]:
    """(load, save) in GB/s, medians."""
    num_pages = min(ARENA_BYTES // page_bytes, MAX_PAGES)
    num_parts = page_bytes // part_bytes
    store = Layout("gqa", 0, 16, "bfloat16", num_parts, (part_bytes // 2,))
    layout = PageLayout(store, 1, 0, (num_parts, part_bytes // 2), "bfloat16", 0, num_parts, 0, num_parts)
    pool = PagePool(layout, num_pages + 1, torch.device("cuda"))
    pool.tensor.view(torch.int16).random_()
    data_offset = ARENA_BYTES // GRANULE_BYTES * 8
    words = np.memmap(path, np.uint64, "r+", shape=(data_offset // 8,))
    words[:] = GENERATION
    copier = PageCopier(pool, layout)
    copier.attach(ArenaSpec(str(path), data_offset + ARENA_BYTES, data_offset, page_bytes))
    speeds: dict[str, list[float]] = {"load": [], "save": []}
    checksums = [b""] * num_pages
    for _ in range(NUM_RUNS + 1):  # the first run registers the arena
        for kind in ("save", "load"):
            deadline_s = time.monotonic() + 60
            copies = [
                BlockCopy(index, index + 1, index * page_bytes, GENERATION, deadline_s, checksums[index] if kind == "load" else b"")
                for index in range(num_pages)
            ]
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            copier.submit(*((copies, []) if kind == "load" else ([], copies)))
            results: list[CopyResult] = []
            while len(results) < num_pages:
                select.select([copier], [], [], 10)
                results += copier.results()
            speeds[kind].append(num_pages * page_bytes / (time.perf_counter() - started_s) / 1e9)
            assert all(result.ok for result in results), results[0]
            if kind == "save":
                checksums = [result.checksums for result in sorted(results)]
    copier.close()
    return statistics.median(speeds["load"][1:]), statistics.median(speeds["save"][1:])


def bare_dma() -> float:
    """GB/s from pinned memory in one piece."""
    host = torch.empty(ARENA_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(ARENA_BYTES, dtype=torch.uint8, device="cuda")
    speeds = []
    for _ in range(NUM_RUNS + 1):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        speeds.append(ARENA_BYTES / (time.perf_counter() - started_s) / 1e9)
    return statistics.median(speeds[1:])


def main() -> list[Row]:
    path = Path(f"/dev/shm/mobula-transfer-bench-{os.getpid()}")
    rows: list[Row] = [("DMA of pinned memory", bare_dma(), "GB/s", None, True)]
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, ARENA_BYTES + ARENA_BYTES // GRANULE_BYTES * 8)
    try:
        for page_bytes, part_bytes in ((2 << 20, 256 << 10), (512 << 10, 256 << 10), (128 << 10, 64 << 10), (32 << 10, 16 << 10)):
            load, save = measure(path, page_bytes, part_bytes)
            rows.append((f"load, pages of {page_bytes >> 10} KiB", load, "GB/s", None, True))
            rows.append((f"save, pages of {page_bytes >> 10} KiB", save, "GB/s", None, True))
    finally:
        path.unlink()
    return rows


if __name__ == "__main__":
    for name, value, unit, _, _ in main():
        print(f"{name:32} {value:6.1f} {unit}")
