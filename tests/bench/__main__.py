"""`make bench`: prints every CPU budget with the figure measured on this machine.

Each benchmark module has `main() -> list[(name, value, unit, budget, ok)]`. Ratios are taken within one run, so they hold on a shared
machine.
usage: python -m tests.bench [NAME ...]
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

NAMES = ("scheduler_bench", "dispatch_bench", "store_bench", "peer_bench", "frontdoor_bench", "model_bench")


def main(names: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    console = Console()
    table = Table(title=f"budgets on {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for column in ("what", "measured", "budget", ""):
        table.add_column(column)
    missed = 0
    for name in names or list(NAMES):
        console.print(f"running {name}", highlight=False)
        for what, value, unit, budget, ok in importlib.import_module(f"tests.bench.{name}").main():
            missed += not ok
            table.add_row(what, f"{value:.4g} {unit}", str(budget), "ok" if ok else "missed")
    console.print(table)
    console.print(f"{missed} missed" if missed else "all budgets met")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
