"""The store as a state machine: requests, deadlines and deaths in, outcomes and events out. No grpc, no threads, no waiting.

One thread calls it. Time comes from the clock it was given; it acts on deadlines only in `advance`, which its owner calls when `next_s`
says so. The watcher reports the deaths of processes. What may be in which state: `cache_store.blocks` (slots), `cache_store.leases`.

A session ends by Detach, by the death of all its processes, or because one of its write leases has passed its deadline, and then those
processes are killed. Its pins and claims end at once. Its unfinished slots are quarantined until the kernel says that no process is left
that could write to them.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Callable, Sequence

from cache_store.accesses import Accesses
from cache_store.blocks import Block, BlockState, new_block
from cache_store.config import StoreConfig
from cache_store.errands import Errands
from cache_store.errors import ArenaTooSmall, LayoutMismatch, StoreRefused, StoreUnavailable
from cache_store.invariants import check_leases
from cache_store.keys import DTYPE_BYTES, BlockKey, Layout
from cache_store.leases import ClaimBatch, Claims, Deadlines, Pin, ReadLease, Session, WriteLease
from cache_store.outcomes import ClaimOutcome, CommitOutcome, Pinned, Placed, ReserveOutcome, StoreStat, WatchEvent, commit_outcome
from cache_store.pins import Pins
from cache_store.processes import ProcessIdentity, ProcessWatcher
from cache_store.tiers.dram import DramTier
from cache_store.watch import ChangeLog

log = logging.getLogger(__name__)

CommitBlock = tuple[bytes, Sequence[int], Sequence[int]]  # key, part indices, their checksums


class Store:
    """Borrows the tier. Every method either raises and changes nothing, or does all of its work."""

    def __init__(
        self,
        config: StoreConfig,
        make_tier: Callable[[Callable[[bytes], None], Callable[[bytes], None]], DramTier],
        watcher: ProcessWatcher,
        clock: Callable[[], float],
        listener: Callable[[WatchEvent], None] = lambda event: None,
    ) -> None:
        """`make_tier(on_stored, on_removed)`. The listener hears of changes in the order in which they happened."""
        self.epoch = secrets.token_hex(8)
        self.changes = ChangeLog(self.epoch, listener)
        self.accesses = Accesses(clock)
        self.tier = make_tier(lambda key: self.changes.stored("dram", key), self._note_removed)
        self._config, self._watcher, self._clock = config, watcher, clock
        self._sessions: dict[str, Session] = {}
        self._ending: dict[str, Session] = {}  # those with quarantined slots
        self._claims = Claims(config.max_claims)
        self._deadlines = Deadlines()
        self._lease_ids = itertools.count(1)
        self.errands = Errands(self.tier, self._lease_ids, self._admit)
        self.pins = Pins(config, self.tier, self.errands, self._deadlines, clock)
        self._num_hits = self._num_misses = self._num_committed = self._num_killed = 0

    def attach(self, layout: Layout, processes: Sequence[tuple[int, int]], label: str) -> Session:
        """ArenaTooSmall, LayoutMismatch (a layout that makes no sense), StoreRefused (too many sessions, or not such a process)."""
        _check_layout(layout)
        if not self.tier.can_hold(layout.block_bytes):
            raise ArenaTooSmall(
                f"a block of {layout.block_bytes} bytes does not fit into an extent: raise --store-memory, or lower --block-size"
            )
        identities = tuple(sorted({ProcessIdentity(*process) for process in processes}))
        if not identities:
            raise StoreRefused("a session needs the processes that will touch the arena, to be sure of their end")
        earlier = [
            session
            for session in self._sessions.values()
            if (session.label, session.layout, session.processes) == (label, layout, identities)
        ]
        if len(self._sessions) + len(self._ending) - len(earlier) >= self._config.max_sessions:
            raise StoreRefused(f"there are {self._config.max_sessions} sessions already")
        session = Session(secrets.token_hex(16), label, layout, layout.digest(), identities)
        try:
            for identity in identities:
                session.alive[identity] = self._watcher.watch(identity, lambda identity=identity: self._exited(session, identity))  # type: ignore[misc]
        except StoreRefused:
            _unwatch(session)
            raise
        for each in earlier:
            log.info("session %s (%s) is replaced by a later one of the same processes", each.session_id[:8], label)
            self._end(each)
        self._sessions[session.session_id] = session
        self.changes.flush()
        return session

    def detach(self, session_id: str) -> None:
        self._end(self.session(session_id))
        self.changes.flush()

    def lookup(self, session_id: str, keys: Sequence[bytes]) -> int:
        """How many leading keys are stored under the session's layout."""
        return self.tier.find(keys, self.session(session_id).layout_digest)

    def claim(self, session_id: str, keys: Sequence[BlockKey], ttl_s: float) -> list[ClaimOutcome]:
        session = self.session(session_id)
        batch = ClaimBatch(session)
        outcomes = [self._claim(batch, key) for key in keys]
        if batch.keys:
            self._deadlines.add(self._deadline_s(ttl_s), batch)
        return outcomes

    def acquire(self, session_id: str, keys: Sequence[bytes], ttl_s: float) -> Pinned:
        """Pins the leading keys that are stored under the session's layout, for at most `ttl_s`."""
        session = self.session(session_id)
        blocks = self.tier.leading(keys, session.layout_digest) if self._may_lease(session) else []
        self._num_hits += len(blocks)
        self._num_misses += len(keys) - len(blocks)
        if not blocks:
            return Pinned(0, [])
        self.tier.pin(blocks)
        self.tier.touch(blocks)  # last: the policy hears of it at the next call, not in this one
        lease = ReadLease(next(self._lease_ids), session, blocks)
        session.reads[lease.lease_id] = lease
        self._deadlines.add(self._deadline_s(ttl_s), lease)
        return Pinned(lease.lease_id, blocks)

    def reserve(
        self, session_id: str, keys: Sequence[bytes], parents: Sequence[bytes], ttl_s: float, first: Sequence[bool] | None = None
    ) -> Placed:
        """Slots to write into. `first` says per key that its parent is a root; None: any parent that the store does not know is one."""
        session = self.session(session_id)
        lease = WriteLease(next(self._lease_ids), session)
        outcomes: list[ReserveOutcome] = []
        blocks: list[Block | None] = []
        asked: set[bytes] = set()
        for index, (key, parent) in enumerate(zip(keys, parents, strict=True)):
            is_first = first[index] if first is not None else parent not in self.tier.index and parent not in asked
            outcome, block = self._reserve(lease, key, None if is_first else parent)
            outcomes.append(outcome)
            blocks.append(block)
            asked.add(key)
        if lease.blocks:
            session.writes[lease.lease_id] = lease
            self._deadlines.add(self._deadline_s(ttl_s) + self._config.kill_grace_s, lease)
        self.changes.flush()
        return Placed(lease.lease_id if lease.blocks else 0, outcomes, blocks)

    def commit(self, session_id: str, lease_id: int, blocks: Sequence[CommitBlock]) -> list[CommitOutcome]:
        """Records checksums. A lease whose blocks are all visible is over. ValueError when a part does not exist."""
        session = self.session(session_id)
        for key, parts, checksums in blocks:
            if len(parts) != len(checksums) or any(not 0 <= part < session.layout.num_parts for part in parts):
                raise ValueError(f"block {key.hex()}: {len(checksums)} checksums for parts {list(parts)} of {session.layout.num_parts}")
        lease = session.writes.get(lease_id)
        held = [lease.blocks.get(key) if lease else None for key, _, _ in blocks]
        for block, (_, parts, checksums) in zip(held, blocks, strict=True):
            if block is not None and block.state is BlockState.WRITING:
                for part, checksum in zip(parts, checksums, strict=True):
                    block.missing &= ~(1 << part)
                    block.checksums[part] = checksum
                if block.is_complete:
                    self._admit(block)
        self.changes.flush()
        return [commit_outcome(block) for block in held]

    def release(self, session_id: str, lease_ids: Sequence[int]) -> int:
        """Ends leases, also quarantined ones of earlier sessions of the same processes; returns how many were still held.

        The caller vouches that nobody writes to a write lease's slots any more.
        """
        session = self.session(session_id)
        num_released = 0
        for lease_id in lease_ids:
            if (read := session.reads.get(lease_id)) is not None:
                self._end_read(read)
            elif (write := session.writes.get(lease_id)) is not None:
                self._give_back(self._end_write(write, BlockState.ORPHANED))
            elif not self._release_quarantined(session, lease_id):
                continue
            num_released += 1
        self.changes.flush()
        return num_released

    def stat(self) -> StoreStat:
        tier, sessions = self.tier, self._sessions.values()
        return StoreStat(
            epoch=self.epoch,
            blocks=tier.num_stored,
            total_bytes=tier.arena.num_bytes,
            ready_bytes=tier.slots.opened_bytes,
            used_bytes=tier.stored_bytes,
            used_slots=tier.num_stored,
            free_slots=tier.slots.num_free,
            held_slots=tier.num_held,
            quarantined_slots=sum(len(session.quarantined) for session in self._ending.values()),
            pinned_blocks=tier.num_pinned,
            kept_bytes=self.pins.total_bytes,
            num_pins=len(self.pins),
            leased_blocks=sum(session.num_read for session in (*sessions, self.errands.session)) - self.pins.num_blocks,
            leases=sum(len(session.reads) + len(session.writes) for session in sessions),
            sessions=len(sessions),
            claims=len(self._claims),
            hit_blocks=self._num_hits,
            missed_blocks=self._num_misses,
            committed_blocks=self._num_committed,
            evicted_blocks=tier.num_evicted,
            killed_holders=self._num_killed,
        )

    def snapshot(self) -> WatchEvent:
        """All visible blocks of the arena, as of the sequence number of the last event."""
        self.changes.flush()
        keys = [BlockKey(key) for key, block in self.tier.index.items() if block.state is BlockState.STORED]
        return WatchEvent(self.changes.sequence, self.epoch, self.tier.name, keys, [])

    def next_s(self) -> float | None:
        """When to call `advance`, on the clock; None while no deadline is open."""
        return self._deadlines.next_s()

    def advance(self) -> None:
        """Ends what is past its deadline, and kills the holders of overdue slots."""
        now_s = self._clock()
        while (item := self._deadlines.pop_due(now_s)) is not None:
            if isinstance(item, ReadLease):
                self._end_read(item)
            elif isinstance(item, WriteLease):
                self._kill(item)
            elif isinstance(item, Pin):
                self.pins.end(item)
            else:
                self._claims.end_batch(item)
        self.changes.flush()

    def close(self) -> None:
        """Stops watching processes. The tier is its owner's to close."""
        for session in (*self._sessions.values(), *self._ending.values()):
            _unwatch(session)

    def check(self) -> list[str]:
        """Every violated invariant, in words; empty when all is well."""
        problems = self.tier.check() + self._claims.check(self._sessions.values())
        problems += self.pins.check()
        return problems + check_leases(self.tier, list(self._sessions.values()), list(self._ending.values()), self.errands.session)

    def session(self, session_id: str) -> Session:
        """StoreUnavailable when there is none of that name."""
        session = self._sessions.get(session_id)
        if session is None:
            raise StoreUnavailable("the store does not know this session: it has ended, or the store was restarted; attach again")
        return session

    def _deadline_s(self, ttl_s: float) -> float:
        return self._clock() + min(max(ttl_s, 0.0), self._config.max_ttl_s)

    def _may_lease(self, session: Session) -> bool:
        return len(session.reads) + len(session.writes) < self._config.max_leases

    def _claim(self, batch: ClaimBatch, key: BlockKey) -> ClaimOutcome:
        block = self.tier.index.get(key)
        if block is not None and block.state is BlockState.STORED:
            return ClaimOutcome.STORED
        writer = block.lease.session if block is not None and block.lease is not None else None
        if {writer, self._claims.holder(key)} - {None, batch.session}:
            return ClaimOutcome.ELSEWHERE
        self._claims.add(key, batch)
        return ClaimOutcome.GRANTED

    def _reserve(self, lease: WriteLease, key: bytes, parent_key: bytes | None) -> tuple[ReserveOutcome, Block | None]:
        index, session = self.tier.index, lease.session
        block = index.get(key)
        if block is not None:
            if block.state is not BlockState.STORED:
                return ReserveOutcome.WRITTEN_ELSEWHERE, None
            self.tier.touch([block])
            return ReserveOutcome.STORED, None
        parent = index.get(parent_key) if parent_key is not None else None
        if parent is None and parent_key is not None:
            return ReserveOutcome.NO_PARENT, None
        if parent is not None:
            foreign = parent.lease is not None and parent.lease.session is not session
            if foreign or parent.layout != session.layout_digest:
                return ReserveOutcome.NO_PARENT, None
        block = new_block(key, session.layout_digest, session.layout.block_bytes, session.layout.num_parts, parent)
        if not self._may_lease(session) or not self._place(block):
            return ReserveOutcome.NO_SPACE, None
        block.lease = lease
        lease.blocks[key] = block
        return ReserveOutcome.RESERVED, block

    def _place(self, block: Block) -> bool:
        """What clients have asked to be kept goes last, but it goes."""
        while not self.tier.place(block):
            if not self.pins.give_up_one():
                return False
        return True

    def _admit(self, block: Block) -> None:
        """Makes a complete block visible, and those behind it that waited only for it."""
        to_admit = [block]
        while to_admit:
            block = to_admit.pop(0)
            lease = block.lease
            assert lease
            self.tier.admit(block)
            self._num_committed += 1
            self._claims.forget(block.key)
            del lease.blocks[block.key]
            if not lease.blocks:
                lease.is_over = True
                lease.session.writes.pop(lease.lease_id)
            to_admit += [child for child in block.children if child.state is BlockState.WRITING and child.is_complete]

    def _end_read(self, lease: ReadLease) -> None:
        lease.is_over = True
        del lease.session.reads[lease.lease_id]
        self.tier.unpin(lease.blocks)

    def _end_write(self, lease: WriteLease, state: BlockState) -> list[Block]:
        """Takes from the lease what it still holds; the slots stay held."""
        lease.is_over = True
        del lease.session.writes[lease.lease_id]
        blocks = list(lease.blocks.values())
        for block in blocks:
            self.tier.abandon(block, state)
        return blocks

    def _give_back(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self.tier.free(block)

    def _end(self, session: Session) -> None:
        """Ends an open session."""
        del self._sessions[session.session_id]
        for read in list(session.reads.values()):
            self._end_read(read)
        self._claims.end_session(session)
        for write in list(session.writes.values()):
            session.quarantined += self._end_write(write, BlockState.QUARANTINED)
        if session.quarantined:
            self._ending[session.session_id] = session
        if not session.alive or not session.quarantined:
            self._bury(session)

    def _release_quarantined(self, session: Session, lease_id: int) -> bool:
        """A client that lost its session, not its processes, says that they are done with a lease of that session."""
        for ending in self._ending.values():
            blocks = [block for block in ending.quarantined if block.lease and block.lease.lease_id == lease_id]
            if blocks and ending.processes == session.processes:
                ending.quarantined = [block for block in ending.quarantined if block not in blocks]
                self._give_back(blocks)
                if not ending.quarantined:
                    self._bury(ending)
                return True
        return False

    def _bury(self, session: Session) -> None:
        """Nobody is left who could write to its slots, or it has none."""
        self._ending.pop(session.session_id, None)
        self._give_back(session.quarantined)
        session.quarantined.clear()
        _unwatch(session)

    def _kill(self, lease: WriteLease) -> None:
        """Its slots cannot be taken from a process that may write to them, so the process is taken from the slots."""
        session = lease.session
        pids = [identity.pid for identity in session.alive]
        log.error(
            "session %s (%s) still holds %d slots after its deadline: killing its processes %s",
            session.session_id[:8], session.label, len(lease.blocks), pids,
        )  # fmt: skip
        self._end(session)
        for process in list(session.alive.values()):
            process.kill()
        self._num_killed += len(pids)

    def _exited(self, session: Session, identity: ProcessIdentity) -> None:
        """The kernel says that a process is gone."""
        session.alive.pop(identity).close()
        if session.alive:
            return
        if session.session_id in self._sessions:
            log.info("session %s (%s): every process is gone", session.session_id[:8], session.label)
            self._end(session)
        elif session.session_id in self._ending:
            self._bury(session)
        self.changes.flush()

    def _note_removed(self, key: bytes) -> None:
        self.accesses.removed(key)
        self.changes.removed("dram", key)


def _check_layout(layout: Layout) -> None:
    sizes = (layout.num_parts, layout.block_size, *layout.part_shape)
    if layout.dtype not in DTYPE_BYTES or not layout.part_shape or min(sizes) < 1:
        raise LayoutMismatch(f"not a layout of blocks: {layout}")


def _unwatch(session: Session) -> None:
    for process in session.alive.values():
        process.close()
    session.alive.clear()
