"""Where the time of a restore goes: what an engine asks, copies and computes between a prompt and its first token.

usage: python -m tests.bench.gpu_restore [--shape llama8b] [--runs N]

Made-up weights. A prefix of 8,192 tokens is computed, pushed out of the pages, and asked for again with 64 tokens behind it, and once more
while it is in the pages. Prints each run's times in milliseconds since the prompt was sent.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.engine.store_port import Question, StoreAnswer, StoreEvent
from tests.bench.gpu_engine import LateStore, storing
from tests.bench.gpu_shapes import SHAPES, write_shape
from tests.bench.gpu_workloads import RESTORE_TAIL, SYSTEM_TOKENS, Workloads
from workers.group import RankGroup
from workers.step import CopyResult, StepPlan, StepResult


class Timeline:
    """What happened when, one line each."""

    def __init__(self) -> None:
        self._lines: list[tuple[float, str]] = []
        self._began_s = time.perf_counter()

    def restart(self) -> None:
        self._lines, self._began_s = [], time.perf_counter()

    def note(self, text: str) -> None:
        self._lines.append((time.perf_counter() - self._began_s, text))

    def show(self) -> None:
        for seconds, text in self._lines:
            print(f"  {1e3 * seconds:7.2f}  {text}", flush=True)


class WatchedGroup:
    """A group of ranks that notes plans and answers."""

    def __init__(self, group: RankGroup, timeline: Timeline) -> None:
        self._group, self._timeline = group, timeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def submit(self, plan: StepPlan) -> None:
        num_tokens = sum(row.num_query_tokens for row in plan.rows)
        self._timeline.note(
            f"plan {plan.sequence}: {num_tokens} tokens, {len(plan.loads)} loads, {len(plan.saves)} saves{', waits' if plan.waits else ''}"
        )
        self._group.submit(plan)
        self._timeline.note("  sent")

    def poll(self, timeout_s: float) -> list[StepResult | CopyResult]:
        answers = self._group.poll(timeout_s)
        if num_copies := sum(isinstance(answer, CopyResult) for answer in answers):
            self._timeline.note(f"{num_copies} copies done")
        for answer in answers:
            if isinstance(answer, StepResult):
                self._timeline.note(f"step {answer.sequence} done")
        return answers


class WatchedStore(LateStore):
    """A port that notes questions and answers."""

    def __init__(self, address: str, secret: str, timeline: Timeline) -> None:
        super().__init__(address, secret)
        self._timeline = timeline
        self._names: dict[int, str] = {}

    def ask(self, question: Question) -> int | None:
        ticket = super().ask(question)
        if ticket is not None:
            name = type(question).__name__
            count = f" of {len(question.keys)}" if hasattr(question, "keys") else ""
            self._names[ticket] = name
            self._timeline.note(f"{name}{count} asked")
        return ticket

    def poll(self) -> Sequence[StoreEvent]:
        events = super().poll()
        for event in events:
            if isinstance(event, StoreAnswer):
                self._timeline.note(f"{self._names.pop(event.ticket, '?')} answered")
        return events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama8b")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    timeline = Timeline()
    with contextlib.ExitStack() as stack:
        folder = write_shape(arguments.shape, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        watch = (lambda group: WatchedGroup(group, timeline), lambda address, secret: WatchedStore(address, secret, timeline))
        system = stack.enter_context(storing(folder, "dummy", watch=watch))
        workloads = Workloads(system, int(SHAPES[arguments.shape]["vocab_size"]), 1)
        workloads.warm_up()
        system.attach_store()
        for run in range(arguments.runs):
            prefix = workloads.prompt(SYSTEM_TOKENS)
            system.generate([[*prefix, *workloads.prompt(RESTORE_TAIL)]], 1)
            workloads.push_out()
            for place in ("store", "pages"):
                system.settle()
                timeline.restart()
                seconds, _ = system.generate([[*prefix, *workloads.prompt(RESTORE_TAIL)]], 1)
                print(f"run {run}, from the {place}: {1e3 * seconds:.1f} ms", flush=True)
                timeline.show()


if __name__ == "__main__":
    main()
