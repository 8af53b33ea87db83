"""A store behind the engine's port: slots, leases, eviction, restarts. Judges what the engine asks, answers late and in any order."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from simulated_group import NUM_PARTS, Arena, SimulatedGroup, Slot

from cache_store.client import Acquired, ClaimOutcome, CommitOutcome, Found, PinReply, Reserved, ReservedSlot, ReserveOutcome
from cache_store.client import Slot as AcquiredSlot
from cache_store.keys import BlockKey, Layout
from runtime.engine.store_port import (
    Acquire,
    Claim,
    Commit,
    Lookup,
    Pin,
    Question,
    Release,
    Reserve,
    StoreAnswer,
    StoreEvent,
    StoreLost,
    StoreReady,
    StoreState,
)
from workers.step import ArenaSpec

SLOT_BYTES = 256


@dataclass
class _Block:
    offset: int
    generation: int
    checksums: bytes
    pins: int = 0


@dataclass
class _Lease:
    pinned: list[BlockKey] = field(default_factory=list)
    reserved: dict[BlockKey, tuple[int, int]] = field(default_factory=dict)  # key -> offset, generation


class SimulatedStore:
    """A StorePort. `roots` are the parents of first blocks."""

    def __init__(
        self,
        rng: random.Random,
        num_slots: int,
        roots: set[BlockKey],
        *,
        refusals: float = 0.0,
        lateness: float = 0.5,
        elsewhere: float = 0.0,
    ) -> None:
        """`elsewhere`: how often a block that is claimed turns out to be computed by another replica, which then delivers it or dies."""
        self.roots = roots
        self.num_restarts = 0
        self.num_loaded = 0
        self.num_committed = 0
        self.num_pins = 0
        self.group: SimulatedGroup | None = None
        self._rng, self._num_slots = rng, num_slots
        self._refusals, self._lateness, self._elsewhere = refusals, lateness, elsewhere
        self.num_delivered = 0  # blocks of the other replica
        self._claimed: set[BlockKey] = set()  # by the engine
        self._foreign: dict[BlockKey, int] = {}  # computed by another replica -> claims until it is there
        self._bytes: dict[BlockKey, tuple[int, ...]] = {}  # what was ever committed
        self._state = StoreState.CONNECTING
        self._wake: Callable[[], None] = lambda: None
        self._open: list[tuple[int, Question]] = []
        self._next_ticket = 0
        self._events: list[StoreEvent] = []
        self._content: dict[BlockKey, bytes] = {}  # checksums that a key must have, whoever writes it
        self._parents: dict[BlockKey, BlockKey] = {}
        self._is_up = False

    @property
    def state(self) -> StoreState:
        return self._state

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def start(self, layout: Layout, processes: Sequence[tuple[int, int]], wake: Callable[[], None]) -> None:
        assert layout.num_parts == NUM_PARTS
        assert processes
        self._wake = wake
        self.come_up()

    def come_up(self) -> None:
        """A new, empty store."""
        assert self.group is not None
        self._is_up = True
        self._blocks: OrderedDict[BlockKey, _Block] = OrderedDict()
        self._leases: dict[int, _Lease] = {}
        self._next_lease = 1
        path = f"arena-{self.num_restarts}"
        self._arena = self.group.arenas[path] = Arena(path)
        self._free = [index * SLOT_BYTES for index in range(self._num_slots)]
        for offset in self._free:
            self._arena.slots[offset] = Slot(generation=self._rng.randrange(1000))
        self._events.append(StoreReady(path, ArenaSpec(path, self._num_slots * SLOT_BYTES, 0, SLOT_BYTES)))

    def go_down(self) -> None:
        """Every open question is answered with nothing, then the engine hears of the loss."""
        self._is_up = False
        self.num_restarts += 1
        self._events += [StoreAnswer(ticket, None) for ticket, _ in self._open]
        self._open.clear()
        self._events.append(StoreLost("restarted"))
        self._leases = {}
        self._claimed.clear()
        self._foreign.clear()

    def ask(self, question: Question) -> int | None:
        if self._state is not StoreState.READY or len(self._open) >= 8:
            return None
        self._next_ticket += 1
        if self._is_up:
            self._open.append((self._next_ticket, question))
        else:
            self._events.insert(0, StoreAnswer(self._next_ticket, None))
        return self._next_ticket

    def send(self) -> None:
        pass

    def poll(self) -> list[StoreEvent]:
        self._rng.shuffle(self._open)
        while self._open and self._rng.random() > self._lateness:
            ticket, question = self._open.pop()
            self._events.append(StoreAnswer(ticket, self._answer(question)))
        events, self._events = self._events, []
        for event in events:
            if isinstance(event, StoreReady):
                self._state = StoreState.READY
            elif isinstance(event, StoreLost):
                self._state = StoreState.LOST
        return events

    def close(self) -> None:
        pass

    def evict_one(self, keep: BlockKey | None = None) -> None:
        """The last unpinned block that nobody is writing a child of, so that most often a leaf goes."""
        parents = {self._parents[key] for lease in self._leases.values() for key in lease.reserved}
        idle = [key for key, block in self._blocks.items() if not block.pins and key not in parents and key != keep]
        if idle:
            self._give_back(self._blocks.pop(idle[-1]).offset)

    def _give_back(self, offset: int) -> None:
        assert self.group is not None
        assert not self.group.copies_on(offset, self._arena.path), "a slot came back while a copy uses it"
        slot = self._arena.slots[offset]
        slot.generation += 1
        slot.content = None
        self._free.append(offset)

    def _answer(self, question: Question) -> object:
        match question:
            case Lookup(keys, max_pinned, ttl_s, claim_ttl_s, min_claimed):
                num_blocks = self._num_leading(keys)
                assert not max_pinned or ttl_s > 0
                pinned = self._acquire(keys[: min(max_pinned, num_blocks)]) if max_pinned else None
                missing = keys[num_blocks:] if claim_ttl_s and (len(keys) - num_blocks >= min_claimed or not num_blocks) else []
                return Found(num_blocks, [("dram", num_blocks)], pinned=pinned, claims=[self._claim(key, claim_ttl_s) for key in missing])
            case Claim(keys, ttl_s):
                assert ttl_s > 0
                assert keys
                return [self._claim(key, ttl_s) for key in keys]
            case Acquire(keys, ttl_s):
                assert ttl_s > 0
                return self._acquire(keys)
            case Reserve(keys, parents, first, ttl_s):
                assert ttl_s > 0
                assert first == [parent in self.roots for parent in parents]
                return self._reserve(keys, parents)
            case Commit(lease_id, blocks):
                return [self._commit(lease_id, *block) for block in blocks]
            case Pin(owner, keys, ttl_s, _max_wait_s):
                assert owner
                assert ttl_s > 0
                num_blocks = self._num_leading(keys)
                self.num_pins += bool(num_blocks)
                return PinReply(int(bool(num_blocks)), num_blocks, num_blocks * SLOT_BYTES, num_blocks < len(keys))
            case Release(lease_ids):
                return sum(self._release(lease_id) for lease_id in lease_ids)

    def _num_leading(self, keys: list[BlockKey]) -> int:
        return next((count for count, key in enumerate(keys) if key not in self._blocks), len(keys))

    def _claim(self, key: BlockKey, ttl_s: float) -> ClaimOutcome:
        if key in self._blocks:
            return ClaimOutcome.STORED
        if ttl_s < 0.01:  # given up
            self._claimed.discard(key)
            return ClaimOutcome.GRANTED
        if key not in self._claimed and key not in self._foreign and self._rng.random() < self._elsewhere:
            self._foreign[key] = self._rng.randint(1, 6)
        if key in self._foreign:
            self._foreign[key] -= 1
            if self._foreign[key]:
                return ClaimOutcome.ELSEWHERE
            del self._foreign[key]
            if self._deliver(key):
                return ClaimOutcome.STORED
        self._claimed.add(key)
        return ClaimOutcome.GRANTED

    def _deliver(self, key: BlockKey) -> bool:
        """The other replica writes a block. False when it cannot: then it has died."""
        writing = {other for lease in self._leases.values() for other in lease.reserved}
        parent = self._parents.get(key)
        if not self._free:
            self.evict_one(keep=self._parents.get(key))
        if key not in self._bytes or key in writing or not self._free:
            return False
        if parent is None or (parent not in self._blocks and parent not in self.roots):
            return False
        offset = self._free.pop()
        slot = self._arena.slots[offset]
        slot.generation += 1
        slot.content = self._bytes[key]
        self._blocks[key] = _Block(offset, slot.generation, self._content[key])
        self.num_delivered += 1
        return True

    def _acquire(self, keys: list[BlockKey]) -> Acquired:
        assert len(set(keys)) == len(keys)
        count = self._num_leading(keys)
        if self._rng.random() < self._refusals:
            count = self._rng.randint(0, count)
        if not count:
            return Acquired(0, [], [])
        slots = []
        for key in keys[:count]:
            block = self._blocks[key]
            block.pins += 1
            self._blocks.move_to_end(key)
            slots.append(AcquiredSlot(block.offset, block.generation, block.checksums))
        self.num_loaded += count
        return Acquired(self._lease(_Lease(pinned=list(keys[:count]))), slots, [("dram", count)])

    def _lease(self, lease: _Lease) -> int:
        self._next_lease += 1
        self._leases[self._next_lease] = lease
        return self._next_lease

    def _reserve(self, keys: list[BlockKey], parents: list[BlockKey]) -> Reserved:
        assert len(set(keys)) == len(keys)
        lease, slots = _Lease(), []
        lease_id = self._lease(lease)
        writing = {key for other in self._leases.values() for key in other.reserved}
        for key, parent in zip(keys, parents, strict=True):
            outcome = self._outcome(key, parent, writing)
            if outcome is ReserveOutcome.RESERVED and not self._free:
                self.evict_one(keep=parent)
            if outcome is ReserveOutcome.RESERVED and not self._free:
                outcome = ReserveOutcome.NO_SPACE
            offset = generation = 0
            if outcome is ReserveOutcome.RESERVED:
                offset = self._free.pop()
                slot = self._arena.slots[offset]
                slot.generation += 1
                generation = slot.generation
                lease.reserved[key] = (offset, generation)
                self._parents[key] = parent
                writing.add(key)
            slots.append(ReservedSlot(outcome, offset, generation))
        if not lease.reserved:
            del self._leases[lease_id]
        return Reserved(lease_id if lease.reserved else 0, slots)

    def _outcome(self, key: BlockKey, parent: BlockKey, writing: set[BlockKey]) -> ReserveOutcome:
        if key in self._blocks:
            return ReserveOutcome.STORED
        if key in writing:
            assert self._is_being_released(key), "a block is offered twice at once"
            return ReserveOutcome.WRITTEN_ELSEWHERE
        if self._rng.random() < self._refusals:
            return ReserveOutcome.WRITTEN_ELSEWHERE
        if parent not in self._blocks and parent not in writing and parent not in self.roots:
            return ReserveOutcome.NO_PARENT
        return ReserveOutcome.RESERVED

    def _is_being_released(self, key: BlockKey) -> bool:
        """Whether the engine has given the slot up: its release is under way, overtaken by a later question."""
        releasing = {lease_id for _, question in self._open if isinstance(question, Release) for lease_id in question.lease_ids}
        return any(lease_id in releasing and key in lease.reserved for lease_id, lease in self._leases.items())

    def _commit(self, lease_id: int, key: BlockKey, parts: Sequence[int], checksums: bytes) -> CommitOutcome:
        assert list(parts) == list(range(NUM_PARTS))
        offset, generation = self._leases[lease_id].reserved.pop(key)
        assert checksums == self._content.setdefault(key, checksums), "two contents under one key"
        parent = self._parents[key]
        writing = {other for lease in self._leases.values() for other in lease.reserved}
        assert parent not in writing or self._is_being_released(parent), "a block is committed before its parent"
        self._blocks[key] = _Block(offset, generation, checksums)
        self._claimed.discard(key)
        content = self._arena.slots[offset].content
        assert content is not None
        self._bytes[key] = content
        self.num_committed += 1
        return CommitOutcome.COMMITTED

    def _release(self, lease_id: int) -> int:
        lease = self._leases.pop(lease_id, None)
        assert lease is not None, "a lease was released twice"
        for key in lease.pinned:
            block = self._blocks[key]
            assert self.group is not None
            block.pins -= 1
            if not block.pins:
                assert not self.group.copies_on(block.offset, self._arena.path), "a lease ended while a copy reads its slot"
        for offset, _ in lease.reserved.values():
            self._give_back(offset)
        return 1
