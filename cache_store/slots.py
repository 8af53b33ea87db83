"""Which bytes of the arena belong to whom. Extents are cut into slots of one size when that size needs them.

    pool of extents --cut--> extent of one slot size: free and owned slots --the last owned one returns--> pool

A slot's generation word changes whenever the slot is taken back, and never takes a value again: whoever still knows (offset, generation)
of an earlier use can see that it is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from cache_store.config import GRANULE_BYTES

if TYPE_CHECKING:
    from cache_store.blocks import Block


@dataclass(slots=True, eq=False)
class Extent:
    start: int  # in the slot space
    num_bytes: int
    slot_bytes: int = 0  # 0: never cut. An extent in the pool keeps its last cut, in case the same size wants it again
    owners: list[Block | None] = field(default_factory=list)
    free: list[int] = field(default_factory=list)  # indices into `owners`
    last_access_s: float = 0.0  # the newest of its blocks

    @property
    def num_owned(self) -> int:
        return len(self.owners) - len(self.free)


class Slot(NamedTuple):
    extent: Extent
    number: int  # in the extent
    offset: int  # in the slot space
    generation: int


class SlotSpace:
    """The slots of one arena. Only the store's own thread calls it."""

    def __init__(self, words: memoryview[int] | None) -> None:
        """`words` of the arena, see `cache_store.arena`; None where nobody reads a slot without asking (the disk tier)."""
        self._words = words
        self._generation = 0
        self._pool: list[Extent] = []
        self._by_start: dict[int, Extent] = {}
        self._cut: dict[int, list[Extent]] = {}  # slot size -> its extents
        self._open: dict[int, dict[int, Extent]] = {}  # slot size -> those with a free slot, by start
        self.opened_bytes = 0
        self.largest_bytes = 0  # of any extent

    @staticmethod
    def slot_bytes(block_bytes: int) -> int:
        """The slot size for a block: whole granules."""
        return -(-block_bytes // GRANULE_BYTES) * GRANULE_BYTES

    def add(self, start: int, num_bytes: int) -> None:
        """An extent is allocated and may be used."""
        extent = self._by_start[start] = Extent(start, num_bytes)
        self._pool.append(extent)
        self.opened_bytes += num_bytes
        self.largest_bytes = max(self.largest_bytes, num_bytes)

    def take(self, slot_bytes: int, owner: Block) -> Slot | None:
        """A free slot of this size, from an extent of the size or a new one; None when there is neither."""
        extents = self._open.get(slot_bytes)
        extent = next(iter(extents.values())) if extents else self._cut_one(slot_bytes)
        if extent is None:
            return None
        return self._own(extent, extent.free.pop(), owner)

    def take_at(self, offset: int, slot_bytes: int, owner: Block) -> Slot | None:
        """The slot of this size at `offset`, for a tier that finds its blocks again. None when it is taken, or when no slot of the size
        begins there."""
        extent = self._by_start.get(offset - offset % self.largest_bytes if self.largest_bytes else 0)
        if extent is None or extent.num_bytes < slot_bytes:
            return None
        if not extent.num_owned:
            self._cut_extent(extent, slot_bytes)
        number, misplaced = divmod(offset - extent.start, slot_bytes)
        if extent.slot_bytes != slot_bytes or misplaced or number >= len(extent.owners) or extent.owners[number] is not None:
            return None
        extent.free.remove(number)
        return self._own(extent, number, owner)

    def invalidate(self, offset: int) -> int:
        """Ends the validity of whatever was known about the slot at `offset`; returns its new generation."""
        self._generation += 1
        if self._words is not None:
            self._words[offset // GRANULE_BYTES] = self._generation
        return self._generation

    def give_back(self, slot: Slot) -> None:
        """Frees a slot. Its generation changes here, before anybody else can have it."""
        extent = slot.extent
        assert extent.owners[slot.number] is not None
        self.invalidate(slot.offset)
        extent.owners[slot.number] = None
        extent.free.append(slot.number)
        self._open[extent.slot_bytes][extent.start] = extent
        if not extent.num_owned:
            del self._open[extent.slot_bytes][extent.start]
            self._cut[extent.slot_bytes].remove(extent)
            self._pool.append(extent)

    def others(self, slot_bytes: int) -> list[Extent]:
        """Extents that have been given to other slot sizes, the coldest first."""
        found = [extent for size, extents in self._cut.items() if size != slot_bytes for extent in extents]
        return sorted(found, key=lambda extent: extent.last_access_s)

    def owned(self) -> Iterator[tuple[Extent, int, Block]]:
        """Every slot that is not free."""
        for extent in self._extents():
            for index, owner in enumerate(extent.owners):
                if owner is not None:
                    yield extent, index, owner

    def free_bytes(self, slot_bytes: int) -> int:
        """What slots of this size may still take without an eviction: their own free ones, and the extents of the pool."""
        own = sum(len(extent.free) for extent in self._open.get(slot_bytes, {}).values()) * slot_bytes
        return own + sum(extent.num_bytes for extent in self._pool)

    @property
    def num_free(self) -> int:
        """Free slots in extents that are given to a size; the pool's do not count."""
        return sum(len(extent.free) for extents in self._cut.values() for extent in extents)

    def check(self) -> list[str]:
        """Every violated invariant, in words."""
        problems = []
        extents = [*self._pool, *self._extents()]
        if sum(extent.num_bytes for extent in extents) != self.opened_bytes or len({extent.start for extent in extents}) != len(extents):
            problems.append("the extents are not those that were opened")
        problems += [f"the extent at {extent.start} is in the pool with owned slots" for extent in self._pool if extent.num_owned]
        for size, cut in self._cut.items():
            for extent in cut:
                problems += _check_extent(extent, size, extent.start in self._open[size])
            if self._open[size].keys() - {extent.start for extent in cut}:
                problems.append(f"slot size {size} has free slots in extents that it does not have")
        return problems

    def _extents(self) -> Iterable[Extent]:
        return (extent for extents in self._cut.values() for extent in extents)

    def _cut_one(self, slot_bytes: int) -> Extent | None:
        """An extent of the pool, preferably one that was cut so before."""
        fitting = [extent for extent in self._pool if extent.num_bytes >= slot_bytes]
        if not fitting:
            return None
        return self._cut_extent(next((extent for extent in fitting if extent.slot_bytes == slot_bytes), fitting[0]), slot_bytes)

    def _own(self, extent: Extent, number: int, owner: Block) -> Slot:
        """Records the owner of a slot that is off the free list."""
        extent.owners[number] = owner
        if not extent.free:
            del self._open[extent.slot_bytes][extent.start]
        offset = extent.start + number * extent.slot_bytes
        return Slot(extent, number, offset, self.invalidate(offset))

    def _cut_extent(self, extent: Extent, slot_bytes: int) -> Extent:
        """Gives an extent of the pool to a slot size."""
        self._pool.remove(extent)
        if extent.slot_bytes != slot_bytes:
            num_slots = extent.num_bytes // slot_bytes
            extent.slot_bytes = slot_bytes
            extent.owners = [None] * num_slots
            extent.free = list(range(num_slots - 1, -1, -1))
        extent.last_access_s = 0.0
        self._cut.setdefault(slot_bytes, []).append(extent)
        self._open.setdefault(slot_bytes, {})[extent.start] = extent
        return extent


def _check_extent(extent: Extent, slot_bytes: int, is_open: bool) -> list[str]:
    name = f"the extent at {extent.start}"
    problems = []
    if extent.slot_bytes != slot_bytes or len(extent.owners) != extent.num_bytes // slot_bytes:
        problems.append(f"{name} is cut for {extent.slot_bytes} bytes and kept with {slot_bytes}")
    if len(set(extent.free)) != len(extent.free):
        problems.append(f"{name} has a slot that is free twice")
    problems += [f"{name}: slot {index} is owned and free" for index in extent.free if extent.owners[index] is not None]
    if sum(owner is not None for owner in extent.owners) != extent.num_owned:
        problems.append(f"{name} has a slot that is neither owned nor free")
    if is_open != bool(extent.free):
        problems.append(f"{name} has {len(extent.free)} free slots, but is {'' if is_open else 'not '}listed as open")
    if not extent.num_owned:
        problems.append(f"{name} is empty and not in the pool")
    return problems
