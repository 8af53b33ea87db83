"""`make bench`: prints every CPU budget with the figure measured on this machine, its ratio, and how that compares with the recorded one.

Each benchmark module has `main()` -> rows (`tests.bench.rows`).
usage: python -m tests.bench [--record] [NAME ...]
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys

from rich.console import Console
from rich.table import Table

from tests.bench.rows import Measured, machine, measured, python_loop_s, read_record, write_record

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before a benchmark imports torch

NAMES = ("scheduler_bench", "dispatch_bench", "store_bench", "peer_bench", "eviction_bench", "frontdoor_bench", "model_bench", "load_bench")


def main(arguments: list[str]) -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a file holds lines of any length
    names = [argument for argument in arguments if argument != "--record"]
    rows: list[Measured] = []
    for name in names or list(NAMES):
        console.print(f"running {name}", highlight=False)
        before_s = python_loop_s()
        found = importlib.import_module(f"tests.bench.{name}").main()
        rows += measured(found, statistics.mean((before_s, python_loop_s())))
    show(rows, console)
    if "--record" in arguments:
        write_record(rows)
    return 0


def show(rows: list[Measured], console: Console) -> None:
    record = read_record()
    table = Table(title=f"budgets on {machine()}" + (f"; recorded on {record['machine']}" if record["machine"] else ""))
    for column in ("what", "measured", "budget", "", "ratio", "recorded"):
        table.add_column(column)
    missed = regressed = 0
    for entry in rows:
        row, worse = entry.row, entry.verdict(record["rows"])
        missed, regressed = missed + (not row.ok), regressed + bool(worse)
        before = record["rows"].get(row.key)
        verdict = " ".join(filter(None, (("ok" if row.ok else "missed") if row.budget != "printed" else "", worse)))
        ratio = f"{entry.ratio:.3g} of {entry.of}" if entry.of else ""
        table.add_row(row.name, f"{row.value:.4g} {row.unit}", row.budget, verdict, ratio, f"{before['ratio']:.3g}" if before else "")
    console.print(table)
    console.print(f"{missed} missed, {regressed} regressed" if missed or regressed else "all budgets met, nothing regressed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
