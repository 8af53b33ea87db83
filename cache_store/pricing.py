"""What a tier's blocks cost, and whether a request does better to compute them: one function decides, from rates measured while running.

    cost of bringing n blocks      latency of the tier + n * bytes of a block * (1 / rate of the tier + 1 / rate of the arena)
    cost of computing n blocks     n * tokens of a block / rate of the replica

The arena's rate is that of copies into pages, which blocks of every tier go through.

A request uses a prefix, so the question is only where to stop. Bringing and computing do not overlap for one request, so costs add up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PRIORS = {"dram": (0.0, 10e9), "disk": (1e-3, 1e9), "peer": (2e-3, 1e9)}  # seconds, bytes/s, until measured
LARGE_BYTES = 1 << 20  # a batch from here on tells a rate, a smaller one a latency
WEIGHT = 0.3  # of the newest measurement
FORGET_AFTER_S = 30.0  # without a measurement a figure drifts back to its prior: a tier that was slow once is tried again


@dataclass(slots=True)
class Figure:
    """One measured quantity, exponentially weighted."""

    prior: float
    value: float = 0.0
    measured_s: float = -math.inf

    def note(self, measured: float, now_s: float) -> None:
        self.value = (1 - WEIGHT) * self.at(now_s) + WEIGHT * measured
        self.measured_s = now_s

    def at(self, now_s: float) -> float:
        share = math.exp(-max(0.0, now_s - self.measured_s - FORGET_AFTER_S) / FORGET_AFTER_S) if self.measured_s > -math.inf else 0.0
        return float(share * self.value + (1 - share) * self.prior)


@dataclass(slots=True)
class TierCost:
    """What a batch from a tier takes: latency + bytes / rate. Small batches measure the one, large ones the other: a block that came alone
    must not make a thousand look slow."""

    latency_s: Figure
    bytes_per_s: Figure

    def note(self, num_bytes: int, seconds: float, now_s: float) -> None:
        if num_bytes >= LARGE_BYTES:
            self.bytes_per_s.note(num_bytes / max(seconds - self.latency_s.at(now_s), seconds / 10), now_s)
        else:
            self.latency_s.note(max(0.0, seconds - num_bytes / self.bytes_per_s.at(now_s)), now_s)


class Choice(NamedTuple):
    num_blocks: int  # leading blocks to bring; the others are cheaper to compute
    load_s: float  # expected, for those
    compute_s: float  # expected, for the same blocks
    saved_s: float  # against computing all that was found


@dataclass(slots=True)
class Ledger:
    """The rates, what was chosen, and what it turned out to cost. Owned by the store's thread."""

    clock: Callable[[], float]
    costs: dict[str, TierCost] = field(default_factory=lambda: {t: TierCost(Figure(s), Figure(rate)) for t, (s, rate) in PRIORS.items()})
    num_brought: Counter[str] = field(default_factory=Counter)  # blocks chosen, by tier
    num_refused: Counter[str] = field(default_factory=Counter)  # blocks found and left, by tier
    regret_s: Counter[str] = field(default_factory=Counter)  # by tier: what bringing took beyond what computing would have
    brought_bytes: Counter[str] = field(default_factory=Counter)

    def choose(self, runs: Sequence[tuple[str, int]], block_bytes: int, block_tokens: int, tokens_per_s: float) -> Choice:
        """How much of what was found to bring: `runs` are (tier, number of blocks) from the first missing block on. `tokens_per_s` is the
        replica's rate of prefill; 0: unknown, everything is brought."""
        now_s = self.clock()
        block_s = block_tokens / tokens_per_s if tokens_per_s > 0 else math.inf
        copy_s = block_bytes / self.costs["dram"].bytes_per_s.at(now_s)
        best = position = 0
        best_s = load_s = best_load_s = 0.0  # seconds beyond computing everything
        gain_s = 0.0
        for tier, count in runs:
            cost = self.costs[tier]
            bring_s = 0.0 if tier == "dram" else cost.latency_s.at(now_s) + count * block_bytes / cost.bytes_per_s.at(now_s)
            cost_s = bring_s + count * copy_s
            load_s += cost_s
            gain_s += cost_s - count * block_s
            position += count
            if gain_s <= best_s:
                best, best_s, best_load_s = position, gain_s, load_s
        self._count(runs, best)
        return Choice(best, best_load_s, best * block_s if tokens_per_s > 0 else 0.0, -best_s if tokens_per_s > 0 else 0.0)

    def copied(self, bytes_per_s: float) -> None:
        """A replica has measured its copies from the arena into pages."""
        self.costs["dram"].bytes_per_s.note(bytes_per_s, self.clock())

    def brought(self, tier: str, num_bytes: int, seconds: float, compute_s: float) -> None:
        """One batch has arrived. `compute_s`: what computing it would have taken; 0: unknown."""
        self.brought_bytes[tier] += num_bytes
        if seconds > 0 and num_bytes:
            self.costs[tier].note(num_bytes, seconds, self.clock())
        if compute_s > 0:
            self.regret_s[tier] += max(0.0, seconds - compute_s)  # type: ignore[assignment]  # a Counter of seconds

    def _count(self, runs: Sequence[tuple[str, int]], num_blocks: int) -> None:
        for tier, count in runs:
            chosen = min(count, num_blocks)
            num_blocks -= chosen
            self.num_brought[tier] += chosen
            self.num_refused[tier] += count - chosen
