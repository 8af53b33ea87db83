"""The scheduler's share of a step: plan and apply, 256 rows in steady decode, two steps in flight.

Each step is timed in turn with a bare loop over as many rows that only makes the tuples of a plan.
"""

from __future__ import annotations

import gc
import statistics
import time
from array import array

from cache_store.key_chains import KeyChains
from cache_store.keys import BlockKey, hash_fields
from runtime.engine.block_manager import BlockManager
from runtime.engine.config import EngineConfig, StepLimits
from runtime.engine.live import EngineRequest, LiveRequest
from runtime.engine.outputs import Outputs
from runtime.engine.scheduler import Launched, Scheduler
from tests.bench.rows import Row
from workers.step import RowResult, SamplingSettings, StepResult, StepRow

NUM_ROWS = 256
BLOCK_SIZE = 16
PROMPT_TOKENS = 512
NUM_STEPS = 400
WARM_STEPS = 100
NUM_RUNS = 5
BUDGET_MS = 1.0


def _decoding_batch() -> tuple[Scheduler, Outputs]:
    """256 rows of 512 prompt tokens, past their prompts; their positions in a block are spread."""
    blocks = BlockManager(NUM_ROWS * 128, BLOCK_SIZE)
    scheduler = Scheduler(EngineConfig(), StepLimits(NUM_ROWS, 2048, 768), blocks)
    outputs = Outputs(blocks)
    root, chains = BlockKey(hash_fields("bench")), KeyChains()
    for number in range(NUM_ROWS):
        prompt = array("I", range(number, number + PROMPT_TOKENS - number % BLOCK_SIZE))
        request = EngineRequest(0, f"r{number}", prompt, SamplingSettings(), 4096, frozenset({1, 2}))
        scheduler.add(LiveRequest(request, number, 0.0, 8192, root, chains))
    while scheduler.num_queued_tokens:
        launched = scheduler.plan()
        assert launched is not None
        outputs.apply(launched, _result(launched), 0.0)
    return scheduler, outputs


def _result(launched: Launched) -> StepResult:
    rows = [
        RowResult(row.row_id, [7] if live.num_confirmed + row.num_query_tokens >= len(live.tokens) else [])
        for live, row in zip(launched.requests, launched.plan.rows, strict=True)
    ]
    return StepResult(launched.plan.sequence, rows, 0.0)


def _bare_step(rows: list[StepRow]) -> None:
    """What no scheduler could do without: a plan's row and a result for every request."""
    plan = [StepRow(row.row_id, 1, 0, 0, []) for row in rows]
    StepResult(1, [RowResult(row.row_id, [7]) for row in plan], 0.0)


def _measure() -> tuple[list[float], list[float]]:
    """Seconds of plan + apply of each step, and of the bare loop beside it."""
    scheduler, outputs = _decoding_batch()
    ahead = scheduler.plan()
    assert ahead is not None
    times, bare_times = [], []
    for _ in range(NUM_STEPS):
        result = StepResult(ahead.plan.sequence, [RowResult(row.row_id, [7]) for row in ahead.plan.rows], 0.0)
        began_s = time.perf_counter()
        launched = scheduler.plan()
        outputs.apply(ahead, result, 0.0)
        outputs.take()
        ended_s = time.perf_counter()
        _bare_step(ahead.plan.rows)
        bare_times.append(time.perf_counter() - ended_s)
        times.append(ended_s - began_s)
        assert launched is not None
        assert len(launched.plan.rows) == NUM_ROWS
        ahead = launched
    return times[WARM_STEPS:], bare_times[WARM_STEPS:]


def main() -> list[Row]:
    gc.collect()
    runs = [_measure() for _ in range(NUM_RUNS)]
    p50 = statistics.median(statistics.median(times) for times, _ in runs) * 1e3
    p99 = statistics.median(sorted(times)[int(0.99 * len(times))] for times, _ in runs) * 1e3
    bare = statistics.median(statistics.median(times) for _, times in runs) * 1e3
    name = f"scheduler: plan + apply, {NUM_ROWS} rows decoding"
    return [
        Row(f"{name}, p50", p50, "ms", f"<= {BUDGET_MS:g} ms", p50 <= BUDGET_MS, bare, "a bare loop over the rows"),
        Row(f"{name}, p99", p99, "ms", "printed", True, bare, "a bare loop over the rows", is_compared=False),
    ]
