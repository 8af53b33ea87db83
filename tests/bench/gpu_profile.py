"""Where the time of a step goes: what the host does before the device can begin, and the kernels by time. One rank, made-up weights.

usage: python -m tests.bench.gpu_profile --shape dsv2lite [--decode ROWS ...] [--prefill TOKENS ...] [--behind TOKENS] [--top N]

A decode step has rows of 512 tokens. A prefill step is one prompt, `--behind` tokens of which are in pages already.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from tests.bench.gpu_shapes import MAX_MODEL_LEN, SHAPES, write_shape
from tests.bench.gpu_workloads import DECODE_CONTEXT
from workers.config import WorkerConfig
from workers.parallel import Communicator
from workers.runner import Runner
from workers.step import NewRow, SamplingSettings, StepPlan, StepRow

NUM_TIMED, NUM_PROFILED = 20, 4
NUM_WARM_UPS = 3
NAME_CHARS = 100
STAGES = {  # of a launch, in their order; forward and replay hold the plan of attention
    "lay out": ("_batch", "apply"),
    "plan attention": ("_backend", "begin"),
    "plan captured attention": ("_backend", "begin_graph"),
    "forward": ("", "_forward"),
    "sample": ("", "_sample"),
    "launch, in all": ("", "launch"),
}


class Stages:
    """How long a runner's host is busy with what."""

    def __init__(self, runner: Runner) -> None:
        self.is_on = False
        self._times_s: dict[str, list[float]] = {}
        for stage, (owner, name) in STAGES.items():
            self._watch(getattr(runner, owner) if owner else runner, name, stage)

    def _watch(self, owner: Any, name: str, stage: str) -> None:
        method = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                if self.is_on:
                    self._times_s.setdefault(stage, []).append(time.perf_counter() - began_s)

        setattr(owner, name, timed)

    def clear(self) -> None:
        self._times_s.clear()

    def __str__(self) -> str:
        """Medians, in milliseconds."""
        found = ((stage, self._times_s[stage]) for stage in STAGES if stage in self._times_s)
        return ", ".join(f"{stage} {1e3 * statistics.median(times_s):.2f}" for stage, times_s in found)


class Steps:
    """Steps of a runner, whose rows lie in pages of their own."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.stages = Stages(runner)
        self._row_ids = itertools.count()
        self._vocab_size: int = runner.info_fields["vocab_size"]

    def rows(self, count: int, length: int, num_more: int) -> list[NewRow]:
        """Prompts, with pages for `num_more` tokens behind each."""
        num_pages = -(-(length + num_more) // self.runner.layout.block_size)
        if 1 + count * num_pages > self.runner.pool.num_pages:
            raise SystemExit(f"{count} rows of {length + num_more} tokens do not fit into the card's pages")
        found = []
        for i in range(count):
            tokens = array("I", torch.randint(self._vocab_size, (length,)).tolist()).tobytes()
            pages = list(range(1 + i * num_pages, 1 + (i + 1) * num_pages))
            found.append(NewRow(next(self._row_ids), tokens, length, 0, pages, SamplingSettings(temperature=0.0)))
        return found

    def run(self, rows_in: list[NewRow], sizes: dict[int, int], rows_out: list[int]) -> None:
        rows = [StepRow(row_id, size, 0, 0, []) for row_id, size in sizes.items()]
        self.runner.execute(StepPlan(0, rows_out, rows_in, rows, [], []))

    def prefill(self, rows: list[NewRow]) -> list[int]:
        """Computes whole prompts, as many at once as a step holds."""
        at_once = max(1, self.runner.info_fields["max_num_batched_tokens"] // rows[0].num_prompt_tokens)
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            self.run(part, {row.row_id: row.num_prompt_tokens for row in part}, [])
        return [row.row_id for row in rows]


class Step(NamedTuple):
    """One step, made ready."""

    run: Callable[[], None]
    clean_up: Callable[[], None] = lambda: None


def show(what: str, stages: Stages, new_step: Callable[[], Step], top: int) -> None:
    """Times steps, then profiles some, and prints both."""

    def run(count: int) -> list[float]:
        """Milliseconds of each."""
        times_ms = []
        for _ in range(count):
            step = new_step()
            stages.is_on, began_s = True, time.perf_counter()
            step.run()
            torch.cuda.synchronize()
            times_ms.append(1e3 * (time.perf_counter() - began_s))
            stages.is_on = False
            step.clean_up()
        return times_ms

    run(NUM_WARM_UPS)
    stages.clear()
    steps_ms = run(NUM_TIMED)
    host = str(stages)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run(NUM_PROFILED)
    times_ms: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        times_ms[event.key] += event.self_device_time_total / 1e3 / NUM_PROFILED
        calls[event.key] += event.count / NUM_PROFILED
    print(
        f"{what}: {statistics.median(steps_ms):.2f} ms a step, at most {max(steps_ms):.2f}, kernels {sum(times_ms.values()):.2f} ms\n"
        f"  host, ms: {host}",
        flush=True,
    )
    for name in sorted(times_ms, key=lambda name: -times_ms[name])[:top]:
        print(
            f"  {times_ms[name]:8.3f} ms  {calls[name]:7.1f} x {1e3 * times_ms[name] / calls[name]:8.1f} us  {name[:NAME_CHARS]}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama8b")
    parser.add_argument("--decode", type=int, nargs="*", default=[])
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--behind", type=int, default=0)
    parser.add_argument("--top", type=int, default=25)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_shape(arguments.shape, Path(scratch))
        worker = WorkerConfig(str(folder), load_format="dummy", device="cuda", max_model_len=MAX_MODEL_LEN)
        steps = Steps(Runner(worker, Communicator.single("cuda:0"), lambda *_: None))
    gc.freeze()  # as a rank does
    for count in arguments.decode:
        ids = steps.prefill(steps.rows(count, DECODE_CONTEXT, NUM_WARM_UPS + NUM_TIMED + NUM_PROFILED + 1))
        decode = partial(steps.run, [], dict.fromkeys(ids, 1), [])
        show(f"decode of {count} rows", steps.stages, partial(Step, decode), arguments.top)
        steps.run([], {}, ids)
    for length in arguments.prefill:
        behind = arguments.behind

        def prompt(length: int = length, behind: int = behind) -> Step:
            [row] = steps.rows(1, behind + length, 1)
            rows_in, sizes = [row._replace(num_computed_tokens=behind)], {row.row_id: length}
            return Step(partial(steps.run, rows_in, sizes, []), partial(steps.run, [], {}, [row.row_id]))

        show(f"prompt of {length} tokens behind {behind}", steps.stages, prompt, arguments.top)


if __name__ == "__main__":
    main()
