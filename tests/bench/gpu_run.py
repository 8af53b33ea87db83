"""One system on one shape, in a process of its own: loads it, runs workloads, and writes what is known after each of them.

usage: python -m tests.bench.gpu_run --system mobula --shape llama8b --folder DIR --only decode,prefill --out FILE

`gpu_bench` starts this. The workloads of one call want one engine: either SERVING or STORING ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.gpu_shapes import SHAPES
from tests.bench.gpu_workloads import SERVING, STORING, Figures, Workloads

SYSTEMS = {"mobula": "tests.bench.gpu_engine", "vllm": "tests.bench.gpu_peer"}  # module with `serving` and `storing`


class Outcome:
    """What a run has found, in a file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = {"figures": {}, "settings": {}, "skipped": [], "failed": {}, "done": False}

    def write(self) -> None:
        scratch = self._path.with_suffix(".part")
        scratch.write_text(json.dumps(self.found, default=str))
        os.replace(scratch, self._path)


class Clock(NamedTuple):
    """Seconds since the process was asked for."""

    began_s: float  # time.time()
    budget_s: float

    @property
    def age_s(self) -> float:
        return time.time() - self.began_s

    @property
    def is_over(self) -> bool:
        return self.age_s > self.budget_s


def run(system: Any, workloads: Workloads, names: list[str], outcome: Outcome, clock: Clock, say: Callable[[str], None]) -> None:
    """A workload that fails is told and left out; those that would begin after the budget are skipped."""
    outcome.found["settings"] = system.settings
    outcome.write()
    say(f"ready after {clock.age_s:.1f} s: {json.dumps(outcome.found['settings'], default=str)}")
    workloads.warm_up()
    for name in names:
        if clock.is_over:
            outcome.found["skipped"].append(name)
            outcome.write()
            say(f"{name} is skipped: the budget is spent")
            continue
        workload: Callable[[], Figures] = getattr(workloads, name)
        began_s = time.perf_counter()
        try:
            figures = workload()
        except Exception as error:  # noqa: BLE001 - whatever a system does, the other workloads are wanted
            traceback.print_exc()
            outcome.found["failed"][name] = f"{type(error).__name__}: {error}"
        else:
            outcome.found["figures"] |= figures
            shown = {key: round(value, 2) for key, value in figures.items()}
            say(f"{name} in {time.perf_counter() - began_s:.1f} s: {json.dumps(shown)}")
        outcome.write()


@contextlib.contextmanager
def loaded(system: str, folder: Path, load_format: str, names: list[str], tensor_parallel_size: int = 1) -> Iterator[Any]:
    """ValueError when the workloads want different engines."""
    kinds = {kind for kind, group in (("serving", SERVING), ("storing", STORING)) for name in names if name in group}
    if len(kinds) != 1:
        raise ValueError(f"{', '.join(names)}: of one of {SERVING} and {STORING} only")
    with getattr(importlib.import_module(SYSTEMS[system]), kinds.pop())(folder, load_format, tensor_parallel_size) as running:
        yield running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=sorted(SYSTEMS), required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="with config.json, and weights unless they are made up")
    parser.add_argument("--load-format", choices=("safetensors", "dummy"), default="dummy")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--only", required=True, help="workloads, separated by commas")
    parser.add_argument("--long-streams", type=int, default=16, help="streams of the long decode")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds from --began after which no workload begins")
    parser.add_argument("--began", type=float, default=time.time(), help="when this was asked for, as time.time() says it")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    outcome, clock = Outcome(arguments.out), Clock(arguments.began, arguments.budget)

    def say(text: str) -> None:
        print(f"[{arguments.shape} {arguments.system} {clock.age_s:.0f} s] {text}", file=sys.stderr, flush=True)

    with loaded(arguments.system, arguments.folder, arguments.load_format, names, arguments.tensor_parallel_size) as system:
        outcome.found["figures"]["start_s" if names[0] in SERVING else "start_storing_s"] = clock.age_s
        workloads = Workloads(system, int(SHAPES[arguments.shape]["vocab_size"]), arguments.long_streams)
        run(system, workloads, names, outcome, clock, say)
        outcome.found["done"] = True
        outcome.write()
    say("ended")


if __name__ == "__main__":
    main()
