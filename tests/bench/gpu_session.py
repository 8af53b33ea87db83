"""One session of GPU benchmarks: which children run in which order, what they have found so far, and where it is kept.

results   card
          shapes: by shape      systems: by system, by kind of engine (serving, storing): what `gpu_run.Outcome` writes
                                limits, rows: computed from those; limits are of one card
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.gpu_children import Budget, await_free_memory, run_child, used_memory_mib
from tests.bench.gpu_limits import Card, limits, num_long_streams
from tests.bench.gpu_peer import ENVIRONMENT
from tests.bench.gpu_report import LABELS, OURS, compare, table
from tests.bench.gpu_shapes import write_shape
from tests.bench.gpu_workloads import SERVING, STORING, Figures
from workers.models.config import load_model_config

CHILD_LIMIT_S = 900.0
LEAST_S = 20.0  # of a budget, for a child to be worth its start
OVERTIME_S = 20.0  # that the workload which is running at the end of the budget may still take


def figures_of(entry: dict[str, Any]) -> dict[str, Figures]:
    """By system, of one shape's results."""
    return {
        system: {name: value for outcome in kinds.values() for name, value in outcome["figures"].items()}
        for system, kinds in entry["systems"].items()
    }


class Session:
    """`scratch` is a folder that is removed afterwards; checkpoints lie in it unless --checkpoints names another."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self._arguments = arguments
        self._scratch = scratch
        self._budget = Budget(arguments.budget)
        self._base_mib = used_memory_mib()
        self._num_long_streams = 8
        self._tp: int = arguments.tensor_parallel_size
        self.results: dict[str, Any] = {"card": {}, "load": arguments.load, "tensor_parallel_size": self._tp, "shapes": {}}

    def run(self) -> None:
        self._measure_card()
        for shape in self._arguments.shape:
            entry: dict[str, Any] = {"systems": {}, "limits": {}, "rows": []}
            self.results["shapes"][shape] = entry
            folder = (self._arguments.checkpoints or self._scratch) / shape
            if self._prepare(shape, folder, entry):
                for kind, group in (("serving", SERVING), ("storing", STORING)):
                    for system in self._arguments.system:
                        names = [name for name in group if name in self._arguments.only and (system == OURS or name != "offload")]
                        if names:
                            entry["systems"].setdefault(system, {})[kind] = self._measure(system, shape, folder, kind, names)
                            self.save()
            print(self.table_of(shape), flush=True)
            if not self._arguments.checkpoints:
                shutil.rmtree(folder, ignore_errors=True)

    def table_of(self, shape: str) -> str:
        """Rows, and what is missing."""
        entry, peer = self.results["shapes"][shape], next((system for system in self._arguments.system if system != OURS), "")
        lines = [
            table(
                f"\n{shape} on {self._tp} {self.results['card'].get('name', 'unknown card')}",
                compare(figures_of(entry), entry["limits"]),
                peer,
            )
        ]
        for system, kinds in entry["systems"].items():
            for outcome in kinds.values():
                if outcome["skipped"]:
                    lines.append(f"{LABELS[system]}: skipped, as the budget is spent: {', '.join(outcome['skipped'])}")
                lines += [f"{LABELS[system]}: {name} failed: {reason}" for name, reason in outcome["failed"].items()]
        return "\n".join(lines)

    def save(self) -> None:
        """Compares what there is, and writes everything to --out."""
        for entry in self.results["shapes"].values():
            rows = compare(figures_of(entry), entry["limits"])
            entry["rows"] = [row._asdict() | {"ratio": row.ratio, "share_of_limit": row.share_of_limit} for row in rows]
        if self._arguments.out is not None:
            part = self._arguments.out.with_suffix(".part")
            part.write_text(json.dumps(self.results, indent=1))
            os.replace(part, self._arguments.out)

    def _measure_card(self) -> None:
        path = self._scratch / "card.json"
        reason = run_child("tests.bench.gpu_card", [str(path)], limit_s=120.0)
        if reason:
            print(f"the card is not measured: {reason}", file=sys.stderr, flush=True)
        else:
            self.results["card"] = json.loads(path.read_text())

    def _prepare(self, shape: str, folder: Path, entry: dict[str, Any]) -> bool:
        """Whether `folder` has become one that can be loaded."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._arguments.load == "checkpoint":
            began_s = time.monotonic()
            limit_s = min(CHILD_LIMIT_S, max(1.0, self._budget.left_s))
            if reason := run_child("tests.bench.gpu_checkpoint", [shape, str(folder)], limit_s=limit_s):
                print(f"{shape} has no checkpoint: {reason}", file=sys.stderr, flush=True)
                return False
            entry["checkpoint_s"] = time.monotonic() - began_s
        else:
            write_shape(shape, folder)
        if card := self.results["card"]:
            config = load_model_config(folder)
            self._num_long_streams = num_long_streams(config, card["memory_bytes"])
            if self._tp == 1:
                entry["limits"] = limits(config, Card(*(card[name] for name in Card._fields)), self._num_long_streams)
        return True

    def _measure(self, system: str, shape: str, folder: Path, kind: str, names: list[str]) -> dict[str, Any]:
        """What one child has found; the results hold it while it grows."""
        outcome: dict[str, Any] = {"figures": {}, "settings": {}, "skipped": [], "failed": {}, "done": False}
        if self._budget.left_s < LEAST_S:
            return outcome | {"skipped": names}
        await_free_memory(self._base_mib)
        path = self._scratch / f"{shape}.{system}.{kind}.json"
        arguments = ["--system", system, "--shape", shape, "--folder", str(folder), "--only", ",".join(names), "--out", str(path)]
        arguments += ["--load-format", "safetensors" if self._arguments.load == "checkpoint" else "dummy"]
        arguments += ["--long-streams", str(self._num_long_streams), "--tensor-parallel-size", str(self._tp)]
        arguments += ["--budget", str(self._budget.left_s), "--began", str(time.time())]

        def take() -> bool:
            found = json.loads(path.read_text()) if path.is_file() else {}
            if found and found != outcome:
                outcome.update(found)
                self.results["shapes"][shape]["systems"].setdefault(system, {})[kind] = outcome
                self.save()
            return bool(outcome["done"])

        limit_s = min(CHILD_LIMIT_S, self._budget.left_s + OVERTIME_S)
        reason = run_child("tests.bench.gpu_run", arguments, limit_s=limit_s, env=ENVIRONMENT if system != OURS else None, on_tick=take)
        if reason:
            outcome["failed"][f"the {kind} engine"] = reason
            print(f"{shape}, {LABELS[system]}: {reason}", file=sys.stderr, flush=True)
        return outcome
