"""Plan dispatch: from `submit` of a plan of decode rows to the last rank's answer, with a forward pass that does nothing.

python tests/bench/dispatch_bench.py
"""

from __future__ import annotations

import statistics
import time

from workers.config import WorkerConfig
from workers.group import GroupListener, RankGroup
from workers.local import spawn_ranks
from workers.step import NewRow, SamplingSettings, StepPlan, StepRow
from workers.worker import ECHO

BUDGET_US = 150.0
SECRET = "bench"
BLOCK_SIZE = 16
NUM_WARM_UP = 300
NUM_STEPS = 1000
NUM_RUNS = 5

Row = tuple[str, float, str, float | None, bool]  # name, value, unit, budget, ok


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


def run(world_size: int, all_num_rows: list[int]) -> dict[int, tuple[float, float]]:
    """By number of rows: p50 and p99 in microseconds, each the median of NUM_RUNS interleaved runs."""
    config = WorkerConfig(model="none", tensor_parallel_size=world_size, device="cpu")
    figures: dict[int, list[tuple[float, float]]] = {num_rows: [] for num_rows in all_num_rows}
    with (
        GroupListener(world_size, secret=SECRET) as listener,
        spawn_ranks(listener.address, world_size, SECRET, parts=ECHO) as ranks,
        listener.accept(60.0, check=ranks.check) as group,
    ):
        for _ in range(NUM_RUNS):
            for num_rows in all_num_rows:
                group.load(config, lambda *progress: None, timeout_s=60.0)
                times_us = sorted(measure(group, num_rows))
                figures[num_rows].append((times_us[len(times_us) // 2], times_us[len(times_us) * 99 // 100]))
    return {
        num_rows: (statistics.median(p50 for p50, _ in runs), statistics.median(p99 for _, p99 in runs))
        for num_rows, runs in figures.items()
    }


def main() -> list[Row]:
    rows: list[Row] = []
    for world_size in (2, 4):
        for num_rows, (p50_us, p99_us) in run(world_size, [64, 256]).items():
            name = f"plan dispatch, {num_rows} rows, tp {world_size}"
            budget = BUDGET_US if (world_size, num_rows) == (2, 64) else None
            rows.append((f"{name}, p50", p50_us, "us", budget, budget is None or p50_us <= budget))
            rows.append((f"{name}, p99", p99_us, "us", None, True))
    return rows


if __name__ == "__main__":
    for name, value, unit, budget, ok in main():
        verdict = "" if budget is None else f"budget {budget:g}, {'ok' if ok else 'missed'}"
        print(f"{name:40} {value:8.1f} {unit}  {verdict}")
