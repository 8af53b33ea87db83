"""Tokens per second against concurrent streams, a line per system and shape. matplotlib is needed for this alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

Line = dict[int, float]  # tokens per second by number of streams


def line_of(figures: Mapping[str, float], prefix: str) -> Line:
    """Of figures named PREFIX_COUNT_tok_s."""
    found = {re.fullmatch(rf"{prefix}_(\d+)_tok_s", name): value for name, value in figures.items()}
    return {int(match[1]): value for match, value in found.items() if match}


def draw_chart(lines: Mapping[str, Line], path: Path) -> None:
    """Lines by label. SystemExit with a message where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit(
            f"{path} is not drawn: matplotlib is missing (pip install matplotlib); gpu_bench --draw draws it later from its JSON"
        ) from None
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    for label, line in lines.items():
        counts = sorted(line)
        axes.plot(counts, [line[count] for count in counts], marker="o", label=label)
    ticks = sorted({count for line in lines.values() for count in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.set_xlabel("concurrent streams")
    axes.set_ylabel("output tokens per second")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
