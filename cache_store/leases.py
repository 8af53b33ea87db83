"""Who may touch which slots, and until when. Records only: `cache_store.store` acts on them.

lease        deadline passes                                             its session's processes are gone
ReadLease    the pins end; a reader notices by generation and checksum   the pins end
WriteLease   the session ends, its processes are killed, its slots are   the slots are free
             quarantined
claim        forgotten                                                   forgotten
Pin          forgotten: its blocks may be evicted like others            stays: it is its owner's, not a session's
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection
from dataclasses import dataclass, field

from cache_store.blocks import Block
from cache_store.keys import Layout
from cache_store.processes import ProcessIdentity, WatchedProcess


@dataclass(slots=True, eq=False)
class Session:
    """One client, and every process that maps the arena on its behalf."""

    session_id: str
    label: str
    layout: Layout
    layout_digest: bytes
    processes: tuple[ProcessIdentity, ...]
    alive: dict[ProcessIdentity, WatchedProcess] = field(default_factory=dict)
    reads: dict[int, ReadLease] = field(default_factory=dict)
    writes: dict[int, WriteLease] = field(default_factory=dict)
    tokens_per_s: float = 0.0  # of prefill, as its client said last; 0: unknown
    copy_bytes_per_s: float = 0.0  # from the arena into its pages, likewise
    quarantined: list[Block] = field(default_factory=list)  # once it has ended: what its processes may still write to

    @property
    def num_read(self) -> int:
        """Blocks under its read leases, once for each."""
        return sum(len(lease.blocks) for lease in self.reads.values())


@dataclass(slots=True, eq=False)
class ReadLease:
    lease_id: int
    session: Session
    blocks: list[Block]  # pinned once by this lease
    is_over: bool = False


@dataclass(slots=True, eq=False)
class WriteLease:
    lease_id: int
    session: Session
    blocks: dict[bytes, Block] = field(default_factory=dict)  # held by this lease: WRITING or ORPHANED
    is_over: bool = False


@dataclass(slots=True, eq=False)
class ClaimBatch:
    """Claims made by one call."""

    session: Session
    keys: set[bytes] = field(default_factory=set)  # those not stored, renewed or forgotten since
    is_over: bool = False


@dataclass(slots=True, eq=False)
class Pin:
    """A prefix that an owner has asked to be kept: evicted last."""

    pin_id: int
    owner: str
    loan: ReadLease
    num_bytes: int
    deadline_s: float
    is_over: bool = False


Expiring = ReadLease | WriteLease | ClaimBatch | Pin


class Deadlines:
    """What ends at a given time, unless it is over before."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Expiring]] = []
        self._numbers = itertools.count()
        self._compact_at = 1024

    def add(self, deadline_s: float, item: Expiring) -> None:
        heapq.heappush(self._heap, (deadline_s, next(self._numbers), item))
        if len(self._heap) > self._compact_at:
            self._heap = [entry for entry in self._heap if not entry[2].is_over]
            heapq.heapify(self._heap)
            self._compact_at = max(1024, 2 * len(self._heap))

    def next_s(self) -> float | None:
        """The earliest deadline that still matters."""
        while self._heap and self._heap[0][2].is_over:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_s: float) -> Expiring | None:
        """One item whose deadline has come; None when there is none."""
        next_s = self.next_s()
        if next_s is None or next_s > now_s:
            return None
        return heapq.heappop(self._heap)[2]


class Claims:
    """Which session has said that it will compute a block. At most `max_claims` at a time."""

    def __init__(self, max_claims: int) -> None:
        self._max_claims = max_claims
        self._batches: dict[bytes, ClaimBatch] = {}
        self._keys: dict[Session, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def holder(self, key: bytes) -> Session | None:
        batch = self._batches.get(key)
        return batch.session if batch else None

    def add(self, key: bytes, batch: ClaimBatch) -> None:
        """Records a claim in place of an earlier one; does nothing when the table is full."""
        self.forget(key)
        if len(self._batches) < self._max_claims:
            self._batches[key] = batch
            batch.keys.add(key)
            self._keys.setdefault(batch.session, set()).add(key)

    def forget(self, key: bytes) -> None:
        batch = self._batches.pop(key, None)
        if batch is None:
            return
        batch.keys.discard(key)
        batch.is_over = not batch.keys
        keys = self._keys[batch.session]
        keys.discard(key)
        if not keys:
            del self._keys[batch.session]

    def end_batch(self, batch: ClaimBatch) -> None:
        for key in list(batch.keys):
            self.forget(key)

    def end_session(self, session: Session) -> None:
        for key in list(self._keys.get(session, ())):
            self.forget(key)

    def check(self, sessions: Collection[Session]) -> list[str]:
        """Every violated invariant, in words, where `sessions` are the open ones."""
        problems = [f"claim of {key.hex()} is over" for key, batch in self._batches.items() if batch.is_over or key not in batch.keys]
        problems += [f"an ended session claims {len(keys)} keys" for session, keys in self._keys.items() if session not in sessions]
        if sum(map(len, self._keys.values())) != len(self._batches):
            problems.append("claims by session and claims by key differ")
        return problems
