"""Prefixes that somebody has asked to be kept. They are evicted last, end by themselves, and may not take more than a share of the arena.

A pinned block cannot be chosen by the eviction policy. When nothing else is left to evict, the pin that would end first is given up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from cache_store.blocks import Block
from cache_store.config import StoreConfig
from cache_store.errands import Errands
from cache_store.leases import Deadlines, Pin
from cache_store.tiers.dram import DramTier


class Pins:
    """Runs on the store's thread. A block that several pins keep counts for each of them: none can be moved onto another's account, or
    outlive the pin that it is counted for."""

    def __init__(self, config: StoreConfig, tier: DramTier, errands: Errands, deadlines: Deadlines, clock: Callable[[], float]) -> None:
        self.total_bytes = 0
        self._config, self._tier, self._errands, self._deadlines, self._clock = config, tier, errands, deadlines, clock
        self._pins: dict[int, Pin] = {}
        self._owned_bytes: dict[str, int] = {}
        self._ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def num_blocks(self) -> int:
        """That are kept, once for each pin."""
        return sum(len(pin.loan.blocks) for pin in self._pins.values())

    def add(self, owner: str, blocks: Sequence[Block], ttl_s: float) -> Pin | None:
        """Keeps as many of the leading blocks as the quotas allow, for at most `ttl_s`. None when that is none at all.

        An owner's pins of the same prefix, or of a part of it that would end no later, become one: asking again renews a pin.
        """
        deadline_s = self._clock() + min(max(ttl_s, 0.0), self._config.max_pin_ttl_s)
        covered = self._covered(owner, blocks, deadline_s)
        room = self._room(owner) + sum(pin.num_bytes for pin in covered)
        kept: list[Block] = []
        num_bytes = 0
        for block in blocks:
            if num_bytes + block.num_bytes > room:
                break
            num_bytes += block.num_bytes
            kept.append(block)
        if not kept or len(self._pins) - len(covered) >= self._config.max_pins:
            return None
        loan = self._errands.lend(kept)  # before others end: its blocks are never without a pin
        same = next((pin for pin in covered if pin.loan.blocks == kept), None)
        for pin in covered:
            self.end(pin)
        pin_id = same.pin_id if same else next(self._ids)
        pin = Pin(pin_id, owner, loan, num_bytes, max(deadline_s, same.deadline_s) if same else deadline_s)
        self._pins[pin.pin_id] = pin
        self.total_bytes += num_bytes
        self._owned_bytes[owner] = self._owned_bytes.get(owner, 0) + num_bytes
        self._deadlines.add(pin.deadline_s, pin)
        return pin

    def remove(self, owner: str, pin_ids: Sequence[int]) -> int:
        """Ends pins of this owner; returns how many there were."""
        pins = [pin for pin in map(self._pins.get, set(pin_ids)) if pin is not None and pin.owner == owner]
        for pin in pins:
            self.end(pin)
        return len(pins)

    def of(self, owner: str) -> list[Pin]:
        """An owner's pins; everybody's for the empty owner."""
        return [pin for pin in self._pins.values() if not owner or pin.owner == owner]

    def end(self, pin: Pin) -> None:
        if pin.is_over:
            return
        pin.is_over = True
        del self._pins[pin.pin_id]
        self.total_bytes -= pin.num_bytes
        self._owned_bytes[pin.owner] -= pin.num_bytes
        if not self._owned_bytes[pin.owner]:
            del self._owned_bytes[pin.owner]
        self._errands.end_loan(pin.loan)

    def give_up_one(self) -> bool:
        """Ends the pin that would end first. False when there is none."""
        pin = min(self._pins.values(), key=lambda pin: pin.deadline_s, default=None)
        if pin is not None:
            self.end(pin)
        return pin is not None

    def check(self) -> list[str]:
        """Every violated invariant, in words."""
        problems = [f"pin {pin.pin_id} is over" for pin in self._pins.values() if pin.is_over or pin.loan.is_over]
        if sum(pin.num_bytes for pin in self._pins.values()) != self.total_bytes or sum(self._owned_bytes.values()) != self.total_bytes:
            problems.append(f"the pins do not add up to {self.total_bytes} bytes")
        return problems

    def _covered(self, owner: str, blocks: Sequence[Block], deadline_s: float) -> list[Pin]:
        """The owner's pins that a new one makes needless. A block stands behind one prefix only, so the last one tells."""
        covered = []
        for pin in self.of(owner):
            num_kept = len(pin.loan.blocks)
            is_part = num_kept <= len(blocks) and blocks[num_kept - 1] is pin.loan.blocks[-1]
            if is_part and (num_kept == len(blocks) or pin.deadline_s <= deadline_s):
                covered.append(pin)
        return covered

    def _room(self, owner: str) -> int:
        memory_bytes = self._tier.arena.num_bytes
        total = int(memory_bytes * self._config.max_pinned_share) - self.total_bytes
        own = int(memory_bytes * self._config.max_pinned_share_per_owner) - self._owned_bytes.get(owner, 0)
        return min(total, own)
