"""Blocks in slots: an index from key to block, and who may have a slot when none is free. With the arena under it, the DRAM tier.

`place` -> somebody writes -> `admit` makes a block visible; `abandon` and `free` take a slot back (states: see `cache_store.blocks`).
Readers `pin` blocks against eviction. When no slot is free a block of the same slot size is evicted, or a whole extent of another slot
size is emptied where that one has been idle for longer.
"""

from __future__ import annotations

import bisect
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from cache_store.arena import Arena, ArenaGrower
from cache_store.blocks import Block, BlockState, new_block
from cache_store.config import StoreConfig
from cache_store.eviction import EVICTION, EvictionPolicy
from cache_store.slots import Extent, Slot, SlotSpace
from cache_store.tiers.base import TierBlock

MAX_UNTOLD = 16  # runs of used blocks that a policy may not have heard of
AGE_BOUNDS_S = (1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0)


def _ignore(_key: bytes) -> None:
    pass


class AgeCounts:
    """How long evicted blocks had not been used: counts up to each of AGE_BOUNDS_S and beyond."""

    def __init__(self) -> None:
        self.counts = [0] * (len(AGE_BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, age_s: float) -> None:
        self.counts[bisect.bisect_left(AGE_BOUNDS_S, age_s)] += 1
        self.sum_s += age_s


class SlotTier:
    """The books of one slot space; the bytes are its user's. Callers keep to one thread, or hold a lock."""

    def __init__(
        self,
        words: memoryview[int] | None,
        max_block_bytes: int,
        eviction: str,
        clock: Callable[[], float],
        *,
        on_stored: Callable[[bytes], None] = _ignore,
        on_removed: Callable[[bytes], None] = _ignore,
    ) -> None:
        """`words`: see SlotSpace; `eviction`: key of EVICTION. `on_stored` and `on_removed` hear of every key that becomes visible or
        stops being so."""
        self.index: dict[bytes, Block] = {}  # WRITING and STORED
        self.num_stored = self.num_held = self.num_pinned = self.num_evicted = self.stored_bytes = 0
        self.ages_at_eviction = AgeCounts()
        self.slots = SlotSpace(words)
        self._max_block_bytes = max_block_bytes
        self._make_policy = EVICTION[eviction]
        self._policies: dict[int, EvictionPolicy] = {}  # by slot size
        self._untold: list[
            list[Block]
        ] = []  # used, and the policy has not heard of it: whoever waits for these blocks need not wait for that
        self._clock = clock
        self._on_stored, self._on_removed = on_stored, on_removed

    def can_hold(self, num_bytes: int) -> bool:
        """Whether a block of that size fits into an extent."""
        return self.slots.slot_bytes(num_bytes) <= self._max_block_bytes

    def leading(self, keys: Sequence[bytes], layout: bytes) -> list[Block]:
        """The visible blocks of that layout, up to the first key that has none."""
        found = []
        get, stored = self.index.get, BlockState.STORED
        for key in keys:
            block = get(key)
            if block is None or block.state is not stored or block.layout != layout:
                break
            found.append(block)
        return found

    def touch(self, blocks: Sequence[Block]) -> None:
        """Visible blocks of one layout were used; parents come before their children."""
        if not blocks:
            return
        now_s = self._clock()
        for block in blocks:
            assert block.slot
            block.accessed_s = block.slot.extent.last_access_s = now_s
        self._untold.append(list(blocks))
        if len(self._untold) > MAX_UNTOLD:
            self._tell()

    def pin(self, blocks: Iterable[Block]) -> None:
        """Keeps visible blocks from eviction. Pins add up."""
        for block in blocks:
            if not block.num_pins:
                self.num_pinned += 1
                if not block.children:
                    self._policy(block).shielded(block.key)
            block.num_pins += 1

    def unpin(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.num_pins -= 1
            if not block.num_pins:
                self.num_pinned -= 1
                self._expose(block)

    def place(self, block: Block, offset: int | None = None) -> bool:
        """Gives a new block a slot (the one at `offset`, or any) and puts it into the index, invisible. False, and nothing changed, when
        there is no room."""
        parent = block.parent
        if parent is not None:
            parent.children[block] = None  # before a slot is looked for: the parent must not be evicted for its child
            if parent.state is BlockState.STORED:
                self._policy(parent).shielded(parent.key)
        slot_bytes = self.slots.slot_bytes(block.num_bytes)
        while (slot := self._take(slot_bytes, block, offset)) is None:
            if offset is not None or not self._make_room(block):
                self._unlink(block)
                return False
        block.slot = slot
        slot.extent.last_access_s = self._clock()
        self.index[block.key] = block
        self.num_held += 1
        return True

    def admit(self, block: Block) -> None:
        """Makes a complete block visible."""
        assert block.state is BlockState.WRITING
        block.state = BlockState.STORED
        block.lease = None
        self.num_held -= 1
        self.num_stored += 1
        self.stored_bytes += block.num_bytes
        block.accessed_s = self._clock()
        self._policy(block).admitted(block.key, block.parent.key if block.parent else None)
        self._expose(block)
        self._on_stored(block.key)

    def abandon(self, block: Block, state: BlockState) -> None:
        """Takes a held block out of the index, and with it its descendants, which become ORPHANED. All of them keep their slots, because
        somebody may write there, but whoever looks at a generation will not take the bytes for good."""
        to_visit = [block]
        while to_visit:
            held = to_visit.pop()
            assert held.slot
            to_visit += held.children
            if held.state is BlockState.WRITING:
                del self.index[held.key]
            self._unlink(held)
            held.state = state if held is block else BlockState.ORPHANED
            self.slots.invalidate(held.slot.offset)

    def free(self, block: Block) -> None:
        """Takes an abandoned block's slot back: nobody writes to it any more."""
        assert block.state in (BlockState.ORPHANED, BlockState.QUARANTINED)
        self.num_held -= 1
        self._let_go(block)

    def find(self, keys: Sequence[bytes], layout: bytes) -> int:
        return len(self.leading(keys, layout))

    def discard(self, key: bytes) -> bool:
        block = self.index.get(key)
        if block is None or not block.is_exposed:
            return False
        self._remove(block, evicted=False)
        return True

    def victim(self, num_bytes: int) -> Block | None:
        """The block that would go next for one of `num_bytes`, if any may."""
        self._tell()
        policy = self._policies.get(self.slots.slot_bytes(num_bytes))
        key = policy.victim() if policy is not None else None
        return self.index[key] if key is not None else None

    def evict(self, block: Block) -> None:
        """Gives up an exposed block before its slot is needed."""
        self._remove(block, evicted=True)

    def __len__(self) -> int:
        return self.num_stored

    def check(self) -> list[str]:
        """Every violated invariant, in words: each slot is used, free or held; parents; counters."""
        problems = self.slots.check()
        states: Counter[BlockState] = Counter()
        num_pinned = stored_bytes = 0
        for extent, number, block in self.slots.owned():
            name = f"the slot at {extent.start + number * extent.slot_bytes} ({block.state.value} block {block.key.hex()})"
            slot = block.slot
            states[block.state] += 1
            num_pinned += block.num_pins > 0
            stored_bytes += block.num_bytes if block.state is BlockState.STORED else 0
            if slot is None or slot.extent is not extent or slot.number != number:
                problems.append(f"{name} has an owner that has another slot")
            problems += [f"{name} {problem}" for problem in self._check_block(block)]
        held = states[BlockState.WRITING] + states[BlockState.ORPHANED] + states[BlockState.QUARANTINED]
        counted = (states[BlockState.STORED], held, num_pinned, stored_bytes, states[BlockState.STORED] + states[BlockState.WRITING])
        kept = (self.num_stored, self.num_held, self.num_pinned, self.stored_bytes, len(self.index))
        if counted != kept:
            problems.append(f"(stored, held, pinned, stored bytes, indexed) are counted as {kept}, but are {counted}")
        if states[BlockState.GONE]:
            problems.append(f"{states[BlockState.GONE]} slots belong to blocks that are gone")
        return problems

    def _check_block(self, block: Block) -> list[str]:
        problems = []
        indexed = self.index.get(block.key) is block
        if indexed != (block.state in (BlockState.WRITING, BlockState.STORED)):
            problems.append(f"is {'' if indexed else 'not '}in the index")
        if block.state is BlockState.STORED and (block.missing or block.lease):
            problems.append("is visible, but still being written")
        if block.is_held and block.num_pins:
            problems.append(f"is held with {block.num_pins} pins")
        if block.parent is not None:
            allowed = (BlockState.STORED,) if block.state is BlockState.STORED else (BlockState.STORED, BlockState.WRITING)
            if block.parent.state not in allowed or block not in block.parent.children or block.parent.layout != block.layout:
                problems.append(f"has lost its parent, which is {block.parent.state.value}")
        if any(child.parent is not block for child in block.children):
            problems.append("has a child that does not know it")
        return problems

    def _tell(self) -> None:
        """What was used comes before anything else that a policy hears."""
        untold, self._untold = self._untold, []
        for blocks in untold:
            self._policies[self.slots.slot_bytes(blocks[0].num_bytes)].accessed([block.key for block in reversed(blocks)])

    def _policy(self, block: Block) -> EvictionPolicy:
        if self._untold:
            self._tell()
        size = self.slots.slot_bytes(block.num_bytes)
        policy = self._policies.get(size)
        if policy is None:
            policy = self._policies[size] = self._make_policy()
        return policy

    def _take(self, slot_bytes: int, block: Block, offset: int | None) -> Slot | None:
        return self.slots.take(slot_bytes, block) if offset is None else self.slots.take_at(offset, slot_bytes, block)

    def _expose(self, block: Block) -> None:
        if block.is_exposed:
            self._policy(block).exposed(block.key)

    def _unlink(self, block: Block) -> None:
        parent = block.parent
        if parent is not None:
            parent.children.pop(block, None)
            block.parent = None
            self._expose(parent)

    def _let_go(self, block: Block) -> None:
        assert block.slot
        block.state = BlockState.GONE
        block.lease = None
        self.slots.give_back(block.slot)

    def _remove(self, block: Block, *, evicted: bool) -> None:
        assert block.is_exposed
        del self.index[block.key]
        self._policy(block).removed(block.key, evicted=evicted)
        self._unlink(block)
        self.num_stored -= 1
        self.stored_bytes -= block.num_bytes
        self.num_evicted += evicted
        if evicted:
            self.ages_at_eviction.add(self._clock() - block.accessed_s)
        self._let_go(block)
        self._on_removed(block.key)

    def _make_room(self, block: Block) -> bool:
        """Gives up what is worth least for a slot of the block's size. False when nothing may go."""
        victim = self.victim(block.num_bytes)
        for extent in self.slots.others(self.slots.slot_bytes(block.num_bytes)):
            if victim is not None and victim.slot and extent.last_access_s >= victim.slot.extent.last_access_s:
                break
            if extent.num_bytes >= block.num_bytes and self._empty(extent):
                return True
        if victim is None:
            return False
        self._remove(victim, evicted=True)
        return True

    def _empty(self, extent: Extent) -> bool:
        """Evicts every block of an extent and their descendants. False, and nothing changed, when one of them is held or pinned."""
        doomed = {owner for owner in extent.owners if owner is not None}
        to_visit = list(doomed)
        while to_visit:
            block = to_visit.pop()
            if block.state is not BlockState.STORED or block.num_pins:
                return False
            new = block.children.keys() - doomed
            doomed |= new
            to_visit += new
        for block in sorted(doomed, key=lambda block: -block.depth):
            self._remove(block, evicted=True)
        return True


class DramTier(SlotTier):
    """Slots of the arena, which engines read and write themselves. Owner of the arena: `close` removes it."""

    name = "dram"

    def __init__(
        self,
        arena: Arena,
        config: StoreConfig,
        clock: Callable[[], float],
        *,
        on_stored: Callable[[bytes], None] = _ignore,
        on_removed: Callable[[bytes], None] = _ignore,
    ) -> None:
        largest = min(config.extent_bytes, arena.num_bytes)
        super().__init__(arena.words, largest, config.eviction, clock, on_stored=on_stored, on_removed=on_removed)
        self.arena = arena
        self._grower: ArenaGrower | None = None

    def grow(self) -> bool:
        """Opens the next extent, in this thread; False when there is none. For the first one, and where there is no loop."""
        opened = self.arena.open_next()
        if opened:
            self.slots.add(*opened)
        return opened is not None

    def grow_in_background(self, post: Callable[[Callable[[int, int], None], int, int], object]) -> None:
        """Opens the other extents on a thread; `post(function, start, num_bytes)` has the function called on the tier's own."""
        self._grower = ArenaGrower(self.arena, lambda start, num_bytes: post(self.slots.add, start, num_bytes))

    def read(self, key: bytes, layout: bytes) -> TierBlock | None:
        blocks = self.leading([key], layout)
        if not blocks:
            return None
        block = blocks[0]
        self.touch(blocks)
        assert block.slot
        data = self.arena.read(block.slot.offset, block.num_bytes)
        return TierBlock(key, block.parent.key if block.parent else None, layout, block.checksums.tobytes(), data)

    def write(self, block: TierBlock) -> bool:
        if not self.can_hold(len(block.data)):
            raise ValueError(f"a block of {len(block.data)} bytes is larger than an extent")
        found = self.index.get(block.key)
        if found is not None:
            if found.state is BlockState.STORED:
                self.touch([found])
            return found.state is BlockState.STORED
        parents = [] if block.parent is None else self.leading([block.parent], block.layout)
        if block.parent is not None and not parents:
            return False
        checksums = array("Q", block.checksums)
        made = new_block(block.key, block.layout, len(block.data), len(checksums), parents[0] if parents else None)
        made.missing, made.checksums = 0, checksums
        if not self.place(made):
            return False
        assert made.slot
        self.arena.write(made.slot.offset, block.data)
        self.admit(made)
        return True

    def close(self) -> None:
        if self._grower:
            self._grower.close()
        self.arena.close()


def open_dram(config: StoreConfig) -> DramTier:
    """A tier of its own, with every extent open."""
    with_arena = DramTier(Arena.create(config.directory, config.memory_bytes, config.extent_bytes), config, lambda: 0.0)
    while with_arena.grow():
        pass
    return with_arena
