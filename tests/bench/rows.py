"""What a benchmark reports, and how it compares with what was recorded.

A figure alone says little on a shared machine. So each row has a ratio: to something simple that was measured in turn with it (a bare
socket, a bare gRPC stream, memcpy), or, where a benchmark names nothing, to a loop of plain Python before and after it. Ratios are what
`recorded.json` keeps and what is compared.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RECORD = Path(__file__).parent / "recorded.json"
TOLERANCE = 0.2  # a ratio that is worse by more than this has regressed
PYTHON_LOOP = "a Python loop"
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATIO_UNITS = ("x ", "% of ")  # the value is a ratio already


class Row(NamedTuple):
    """One figure. Benchmarks may return plain tuples of the first five fields."""

    name: str
    value: float
    unit: str
    budget: str  # "<= 2", ">= 20000", or "printed" for a figure without one
    ok: bool
    reference: float | None = None  # what `value` is compared with, in the same unit and the same run
    reference_name: str = PYTHON_LOOP
    is_compared: bool = True  # False: a tail, which says more about what else the machine did

    @property
    def key(self) -> str:
        """The name without figures in parentheses, which differ from run to run."""
        return re.sub(r" \([^)]*\)", "", self.name)

    @property
    def is_higher_better(self) -> bool:
        return self.budget.startswith(">=") or self.unit.endswith("/s")


class Measured(NamedTuple):
    """A row and its ratio."""

    row: Row
    ratio: float
    of: str  # empty: `ratio` is the value, which hangs on no machine's speed

    def verdict(self, recorded: dict[str, Any]) -> str:
        """Against the recorded ratio: empty, or how far it has regressed."""
        before = recorded.get(self.row.key)
        if before is None or before["of"] != self.of or not self.row.is_compared:
            return ""
        change = self.ratio / before["ratio"] - 1 if before["ratio"] else 0.0
        worse = -change if self.row.is_higher_better else change
        return f"regressed by {worse:.0%}" if worse > TOLERANCE else ""


def python_loop_s() -> float:
    """Seconds of a fixed piece of plain Python, the median of nine."""
    times = []
    for _ in range(9):
        began_s = time.perf_counter()
        table = {number: (number, str(number)) for number in range(2000)}
        sum(len(text) + number for number, text in table.values())
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def measured(rows: Sequence[Row | tuple[Any, ...]], loop_s: float) -> list[Measured]:
    """`loop_s`: python_loop_s, as it was while the rows were measured."""
    found = []
    for row in (Row(*row) for row in rows):
        if row.unit.startswith(_RATIO_UNITS):
            found.append(Measured(row, row.value, row.unit.strip("x% ").removeprefix("of ")))
        elif row.reference is not None:
            found.append(Measured(row, row.value / row.reference, row.reference_name))
        elif row.unit in _SECONDS:
            found.append(Measured(row, row.value * _SECONDS[row.unit] / loop_s, PYTHON_LOOP))
        elif row.unit.endswith("/s"):
            found.append(Measured(row, row.value * loop_s, PYTHON_LOOP))
        else:
            found.append(Measured(row, row.value, ""))
    return found


def machine() -> str:
    """The processor by name where the kernel tells it, and the number of cores."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def read_record() -> dict[str, Any]:
    """`machine` and `rows` by key; empty where nothing was recorded."""
    if not RECORD.is_file():
        return {"machine": "", "rows": {}}
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def write_record(rows: Sequence[Measured]) -> None:
    """Replaces these rows and keeps the others."""
    kept = read_record()["rows"]
    new = {
        entry.row.key: {"ratio": round(entry.ratio, 4), "of": entry.of, "value": round(entry.row.value, 4), "unit": entry.row.unit}
        for entry in rows
        if entry.row.is_compared
    }
    RECORD.write_text(json.dumps({"machine": machine(), "rows": dict(sorted((kept | new).items()))}, indent=1) + "\n")
