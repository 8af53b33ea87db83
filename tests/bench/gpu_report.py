"""Figures of two systems side by side, with ratios and with what the card allows. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.bench.gpu_workloads import Figures

OURS = "mobula"
LABELS = {"mobula": "Mobula", "vllm": "vLLM"}
_UNITS = {"_tok_s": "tok/s", "_tokens": "tokens", "_pct": "%", "_ms": "ms", "_s": "s"}  # by the end of a figure's name, longest first


class Compared(NamedTuple):
    """One figure of each system that has it."""

    name: str
    unit: str
    ours: float | None
    theirs: float | None
    limit: float | None  # of the card, in the same unit

    @property
    def ratio(self) -> float | None:
        """Above 1 where ours is better."""
        return _better(self.unit, self.ours, self.theirs)

    @property
    def share_of_limit(self) -> float | None:
        """1 where the card does not allow more."""
        return _better(self.unit, self.ours, self.limit)


def _better(unit: str, ours: float | None, other: float | None) -> float | None:
    if not ours or not other or unit in ("%", "tokens"):
        return None
    return ours / other if unit == "tok/s" else other / ours


def unit_of(name: str) -> str:
    return next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")


def compare(systems: Mapping[str, Figures], limits: Figures) -> list[Compared]:
    """In the order in which ours came, then what only the peer has."""
    ours = systems.get(OURS, {})
    theirs: Figures = next((figures for system, figures in systems.items() if system != OURS), {})
    names = dict.fromkeys((*ours, *theirs))
    return [Compared(name, unit_of(name), ours.get(name), theirs.get(name), limits.get(name)) for name in names]


def table(title: str, rows: Sequence[Compared], peer: str) -> str:
    """`peer`: its key, or empty. Rows where it is better are marked."""
    heads = ["", "unit", LABELS[OURS], *([LABELS[peer], "ratio", ""] if peer else []), "limit", "of limit"]
    lines = [heads]
    for row in rows:
        ratio = row.ratio
        beside = [_shown(row.theirs), f"{ratio:.2f}" if ratio else "", "<" if ratio and ratio < 1 else ""] if peer else []
        share = f"{row.share_of_limit:.0%}" if row.share_of_limit else ""
        lines.append([row.name, row.unit, _shown(row.ours), *beside, _shown(row.limit), share])
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([title, *(line.rstrip() for line in text)])


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"
