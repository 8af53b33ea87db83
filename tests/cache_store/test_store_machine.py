"""Every order of calls, deadlines, deaths and restarts that Hypothesis can think of, with real bytes in the arena and on disk.

After each step the store's own check must be content, and three things must hold that no reader or writer could do without: a pinned slot
keeps its bytes and its generation; no slot is in two hands; what comes from disk is what was written.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from array import array
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache_store.arena import Arena
from cache_store.blocks import Block, BlockState
from cache_store.checksums import part_checksums
from cache_store.config import StoreConfig
from cache_store.errands import Shape
from cache_store.keys import BlockKey
from cache_store.spill import Spiller
from cache_store.store import Store
from cache_store.tiers.disk import DiskTier
from cache_store.tiers.dram import DramTier
from tests.cache_store.conftest import LAYOUT, ROOT, SLOT_BYTES, FakeClock, FakeWatcher, key

NUM_SLOTS, DISK_SLOTS = 8, 10
CHAINS = [[key(f"{name}/{depth}") for depth in range(5)] for name in range(3)]
SHAPE = Shape(LAYOUT.digest(), LAYOUT.block_bytes, LAYOUT.num_parts)
OWNERS = ("one", "two")
rarely = st.integers(0, 7).map(lambda number: number == 5)
chains = st.sampled_from(CHAINS)
lengths = st.sampled_from([5, 3, 4, 2, 1])
ttls = st.sampled_from([1.0, 5.0, 40.0])


def content(block_key: bytes) -> bytes:
    return random.Random(block_key).randbytes(SLOT_BYTES)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="store-machine-"))
        self.clock, self.next_pid = FakeClock(), 1000
        self.is_open = False
        self.open()

    def open(self) -> None:
        """A new store, over an empty arena and over what is on disk."""
        self.watcher = FakeWatcher()
        self.pids: dict[str, int] = {}
        self.writes: dict[int, tuple[str, list[Block]]] = {}
        self.reads: dict[int, tuple[str, list[tuple[bytes, int, int]]]] = {}  # key, offset, generation
        self.hands: dict[int, tuple[int, int]] = {}  # offset a process may write to -> its pid, the lease it got it by
        self.pins: list[tuple[str, int]] = []
        self.fills: list[Block] = []
        self.posted: list[object] = []
        config = StoreConfig(
            memory_bytes=NUM_SLOTS * SLOT_BYTES, extent_bytes=4 * SLOT_BYTES, directory=str(self.directory), secret="x",
            max_pinned_share=0.5, max_pinned_share_per_owner=0.4,
        )  # fmt: skip
        self.disk = DiskTier(str(self.directory / "disk"), DISK_SLOTS * SLOT_BYTES, 5 * SLOT_BYTES)
        self.disk.restore()
        arena = Arena.create(config.directory, config.memory_bytes, config.extent_bytes)

        def make_tier(on_stored: object, on_removed: object) -> DramTier:
            def stored(each: bytes) -> None:
                on_stored(each)  # type: ignore[operator]
                self.spiller.stored(each)

            def removed(each: bytes) -> None:
                on_removed(each)  # type: ignore[operator]
                self.spiller.removed(each)

            return DramTier(arena, config, self.clock, on_stored=stored, on_removed=removed)

        self.store = Store(config, make_tier, self.watcher, self.clock)
        self.spiller = Spiller(self.store.tier, self.disk, self.store.errands, self.posted.append)
        while self.store.tier.grow():
            pass
        self.is_open = True
        self.attach()
        self.attach()
        for keys in CHAINS[:2]:  # more than the arena holds: from here on everything needs an eviction
            self.reserve_in(next(iter(self.pids)), keys, [ROOT, *keys[:-1]], 5.0, commit=True)

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.spiller.close()
            self.store.close()
            self.store.tier.close()
            self.disk.close()

    def teardown(self) -> None:
        """When every holder is gone and every deadline past, nothing is held and nothing pinned."""
        try:
            while self.fills:
                self.store.errands.end_fill(self.fills.pop(), None)
            self.spiller.close()
            for pid in list(self.pids.values()):
                self.watcher.die(pid)
            self.clock.now_s += 10_000.0
            self.store.advance()
            for pid in list(self.watcher.killed):
                self.watcher.die(pid)
            stat = self.store.stat()
            assert (stat.held_slots, stat.pinned_blocks, stat.leases, stat.claims, stat.kept_bytes) == (0, 0, 0, 0, 0)
            assert self.store.check() == []
        finally:
            self.close()
            shutil.rmtree(self.directory)

    def session(self, number: int) -> str | None:
        self.pids = {session: pid for session, pid in self.pids.items() if session in self.store._sessions}
        return list(self.pids)[number % len(self.pids)] if self.pids else None

    def slot(self, block: Block) -> tuple[int, int]:
        assert block.slot
        return block.slot.offset, block.slot.generation

    # Clients

    @rule()
    def attach(self) -> None:
        if len(self.pids) < 4:
            self.next_pid += 1
            self.pids[self.store.attach(LAYOUT, [(self.next_pid, 1)], f"engine {self.next_pid}").session_id] = self.next_pid

    @rule(
        number=st.integers(0, 3),
        keys=chains,
        start=st.sampled_from([0, 0, 1, 2]),
        length=lengths,
        ttl_s=ttls,
        commit=st.sampled_from([True, True, True, False]),
    )
    def reserve(self, number: int, keys: list[BlockKey], start: int, length: int, ttl_s: float, commit: bool) -> None:
        if (session := self.session(number)) is None:
            return
        wanted = keys[start : start + length]
        self.reserve_in(session, wanted, [keys[start - 1] if start else ROOT, *wanted[:-1]], ttl_s, commit=commit)

    def reserve_in(self, session: str, wanted: list[BlockKey], parents: list[BlockKey], ttl_s: float, *, commit: bool) -> None:
        placed = self.store.reserve(session, wanted, parents, ttl_s, [parent == ROOT for parent in parents])
        blocks = [block for block in placed.blocks if block]
        for block in blocks:
            offset, _ = self.slot(block)
            assert offset not in self.hands, "a process may still write to this slot"
            self.hands[offset] = (self.pids[session], placed.lease_id)
            self.store.tier.arena.write(offset, content(block.key))
        if placed.lease_id:
            self.writes[placed.lease_id] = (session, blocks)
            if commit:
                self.commit(placed.lease_id, [0, 1])

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), parts=st.sampled_from([[0], [1], [0, 1], [0, 1]]))
    def commit_some(self, data: st.DataObject, parts: list[int]) -> None:
        self.commit(data.draw(st.sampled_from(sorted(self.writes))), parts)

    def commit(self, lease_id: int, parts: list[int]) -> None:
        session, blocks = self.writes[lease_id]
        if session in self.store._sessions:
            sums = [array("Q", part_checksums(content(block.key), 2)) for block in blocks]
            parts_of = [(block.key, parts, [each[part] for part in parts]) for block, each in zip(blocks, sums, strict=True)]
            outcomes = self.store.commit(session, lease_id, parts_of)
            for block in blocks:
                if block.state is BlockState.STORED:
                    self.hands.pop(self.slot(block)[0], None)
            assert len(outcomes) == len(blocks)

    @rule(number=st.integers(0, 3), keys=chains, length=lengths, ttl_s=ttls)
    def acquire(self, number: int, keys: list[BlockKey], length: int, ttl_s: float) -> None:
        if (session := self.session(number)) is None:
            return
        pinned = self.store.acquire(session, keys[:length], ttl_s)
        if pinned.lease_id:
            self.reads[pinned.lease_id] = (session, [(block.key, *self.slot(block)) for block in pinned.blocks])

    @precondition(lambda self: self.reads or self.writes)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted({**self.reads, **self.writes})))
        session, _ = self.reads.get(lease_id) or self.writes[lease_id]
        if session in self.store._sessions:
            self.store.release(session, [lease_id])
            self.hands = {offset: hand for offset, hand in self.hands.items() if hand[1] != lease_id}

    @rule(number=st.integers(0, 3), keys=chains, ttl_s=ttls)
    def claim(self, number: int, keys: list[BlockKey], ttl_s: float) -> None:
        if (session := self.session(number)) is not None:
            self.store.claim(session, keys, ttl_s)

    @rule(owner=st.sampled_from(OWNERS), keys=chains, length=lengths, ttl_s=ttls)
    def pin(self, owner: str, keys: list[BlockKey], length: int, ttl_s: float) -> None:
        pin = self.store.pins.add(owner, self.store.tier.leading(keys[:length], SHAPE.layout), ttl_s)
        if pin is not None:
            self.pins.append((owner, pin.pin_id))
        assert self.store.pins.total_bytes <= 4 * SLOT_BYTES
        assert sum(each.num_bytes for each in self.store.pins.of(owner)) <= 3 * SLOT_BYTES

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), owner=st.sampled_from(OWNERS))
    def unpin(self, data: st.DataObject, owner: str) -> None:
        _, pin_id = data.draw(st.sampled_from(self.pins))
        mine = any(pin.pin_id == pin_id for pin in self.store.pins.of(owner))
        assert self.store.pins.remove(owner, [pin_id]) == mine

    @rule(seconds=st.sampled_from([0.5, 3.0, 50.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.store.advance()

    @rule(number=st.integers(0, 3), orderly=st.booleans(), really=rarely)
    def end_session(self, number: int, orderly: bool, really: bool) -> None:
        if really and (session := self.session(number)) is not None:
            self.store.detach(session) if orderly else self.die(self.pids[session])

    @precondition(lambda self: self.watcher.killed)
    @rule()
    def killed_process_is_gone(self) -> None:
        self.die(self.watcher.killed.pop(0))

    def die(self, pid: int) -> None:
        self.hands = {offset: hand for offset, hand in self.hands.items() if hand[0] != pid}
        self.watcher.die(pid)

    # The store's own errands

    @rule(keys=chains, depth=st.integers(0, 4))
    def begin_fill(self, keys: list[BlockKey], depth: int) -> None:
        parent = self.store.tier.index.get(keys[depth - 1]) if depth else None
        block = self.store.errands.begin_fill(keys[depth], SHAPE, parent)
        if block is not None:
            self.fills.append(block)

    @precondition(lambda self: self.fills)
    @rule(data=st.data(), intact=st.booleans())
    def end_fill(self, data: st.DataObject, intact: bool) -> None:
        block = self.fills.pop(data.draw(st.integers(0, len(self.fills) - 1)))
        self.store.tier.arena.write(self.slot(block)[0], content(block.key))
        self.store.errands.end_fill(block, part_checksums(content(block.key), 2) if intact else None)
        self.store.changes.flush()

    @rule()
    def spill(self) -> None:
        self.spiller.advance()

    @rule()
    def spilled(self) -> None:
        """What the spiller's thread has posted happens on the store's."""
        while self.posted:
            self.posted.pop(0)()  # type: ignore[operator]

    @rule(keys=chains, depth=st.integers(0, 4))
    def read_from_disk(self, keys: list[BlockKey], depth: int) -> None:
        found = self.disk.read(keys[depth], SHAPE.layout)
        assert found is None or found.data == content(keys[depth])

    @rule(really=rarely)
    def restart(self, really: bool) -> None:
        if really:
            self.close()
            self.open()

    # What must hold

    @invariant()
    def healthy(self) -> None:
        assert self.store.check() == []
        assert self.disk.num_corrupt == 0
        assert self.disk.find([], b"") == 0

    @invariant()
    def readers_see_what_was_written(self) -> None:
        arena = self.store.tier.arena
        for lease_id, (session, slots) in list(self.reads.items()):
            opened = self.store._sessions.get(session)
            if opened is None or lease_id not in opened.reads:
                del self.reads[lease_id]
                continue
            for block_key, offset, generation in slots:
                assert arena.words[offset >> 12] == generation
                assert arena.read(offset, SLOT_BYTES) == content(block_key)

    @invariant()
    def no_slot_is_in_two_hands(self) -> None:
        owners = {extent.start + number * SLOT_BYTES: block for extent, number, block in self.store.tier.slots.owned()}
        for offset, (pid, lease_id) in self.hands.items():
            block = owners.get(offset)
            assert block is not None, f"process {pid} may write to a free slot"
            assert block.is_held, f"process {pid} may write to a visible block"
            assert block.lease is not None
            assert block.lease.lease_id == lease_id
        for block in self.fills:
            assert owners[self.slot(block)[0]] is block
            assert block.is_held


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
