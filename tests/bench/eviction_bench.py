"""The default eviction policy against LRU: block hits on made-up streams of several kinds, and what an access costs.

`mobula cache replay` does the same for a recorded trace.
"""

from __future__ import annotations

import time

from cache_store.eviction import DEFAULT_EVICTION, EVICTION
from cache_store.replay import Trace, replay
from tests.bench.eviction_traces import FAMILIES, make_trace

NUM_REQUESTS = 4000
SIZES = (300, 1000, 3000)  # blocks
SLACK = 0.1  # percentage points that the default may fall below LRU


def _timed(trace: Trace, num_blocks: int, name: str) -> tuple[float, float]:
    """Block hits in percent, and seconds per access."""
    began_s = time.perf_counter()
    rate = replay(trace, num_blocks, EVICTION[name]())
    return 100 * rate, (time.perf_counter() - began_s) / trace.num_blocks


def main() -> list[tuple[str, float, str, str, bool]]:
    rows = []
    for family in FAMILIES:
        trace = make_trace(family, NUM_REQUESTS, 1)
        for size in SIZES:
            lru, _ = _timed(trace, size, "lru")
            default, _ = _timed(trace, size, DEFAULT_EVICTION)
            gain = default - lru
            rows.append((f"eviction: {family}, {size} blocks, LRU {lru:.1f} %", gain, "points", f">= -{SLACK}", gain >= -SLACK))
    trace = make_trace("chats", NUM_REQUESTS, 1)
    for name in EVICTION:
        _, access_s = _timed(trace, 1000, name)
        rows.append((f"eviction: accesses/s of {name}", 1 / access_s, "accesses/s", "printed", True))
    return rows
