"""One node's store as its service sees it: the state machine in the arena, and the tiers below and beside it. Put together in
`cache_store.assembly`. On the loop, which nothing here blocks: whatever can take long happens on threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from cache_store.accesses import MissReason
from cache_store.checksums import CHECKSUM_BYTES
from cache_store.config import StoreConfig
from cache_store.errands import Shape
from cache_store.keys import BlockKey
from cache_store.leases import Session
from cache_store.outcomes import Pinned, StoreStat, WatchEvent
from cache_store.peer_server import PeerServer
from cache_store.promote import Brought, Promoter
from cache_store.spill import Spiller
from cache_store.store import Store
from cache_store.tiers.disk import DiskTier
from cache_store.tiers.peer import PeerTier
from cache_store.watch import EventFeed

Runs = list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Looked:
    runs: Runs  # worth bringing
    num_cheaper_to_compute: int  # behind them
    reason: MissReason | None  # why the key behind the runs is not answered


@dataclass(frozen=True, slots=True)
class Acquired:
    pinned: Pinned
    runs: Runs  # where the pinned blocks came from
    shortfall: MissReason | None


class StoreNode:
    """The store as its service sees it. Made on the loop that uses it."""

    def __init__(
        self,
        config: StoreConfig,
        store: Store,
        feed: EventFeed,
        promoter: Promoter,
        peers: PeerTier,
        disk: DiskTier | None,
        spiller: Spiller | None,
    ) -> None:
        self.config, self.store, self.feed, self.promoter = config, store, feed, promoter
        self.peers, self.disk, self.spiller = peers, disk, spiller
        self.peer_server: PeerServer | None = None
        self.ledger = promoter.ledger
        self._loop = asyncio.get_running_loop()

    def look_up(self, session_id: str, keys: Sequence[bytes], tokens_per_s: float, copy_bytes_per_s: float = 0.0) -> Looked:
        """Which tiers have the leading keys, as far as bringing them is cheaper than computing them."""
        session = self.store.session(session_id)
        session.tokens_per_s = tokens_per_s
        if copy_bytes_per_s not in (0.0, session.copy_bytes_per_s):  # measured anew
            session.copy_bytes_per_s = copy_bytes_per_s
            self.ledger.copied(copy_bytes_per_s)
        found = self.promoter.runs(keys, session.layout_digest)
        num_found = sum(count for _, count in found)
        choice = self.ledger.choose(found, session.layout.block_bytes, session.layout.block_size, tokens_per_s)
        reason = self.store.accesses.looked_up(session_id, keys, num_found)
        num_refused = num_found - choice.num_blocks
        return Looked(_first(found, choice.num_blocks), num_refused, MissReason.CHEAPER_TO_COMPUTE if num_refused else reason)

    async def acquire(self, session_id: str, keys: Sequence[bytes], ttl_s: float, max_wait_s: float) -> Acquired:
        """Pins the leading keys that are in the arena, or come there within `max_wait_s`."""
        session = self.store.session(session_id)
        if max_wait_s <= 0 or self.store.tier.find(keys[-1:], session.layout_digest):  # the arena has what is before a block as well
            pinned = self.store.acquire(session_id, keys, ttl_s)
            return self._acquired(session, pinned, keys, Brought())
        async with self._bringing(session, keys, max_wait_s) as brought:
            pinned = self.store.acquire(session_id, keys, ttl_s)
            return self._acquired(session, pinned, keys, brought)

    def acquire_found(self, session_id: str, keys: Sequence[bytes], looked: Looked, ttl_s: float) -> Acquired | None:
        """Pins leading keys of those that were just looked up, as far as they are worth bringing and in the arena; None: none is."""
        if not looked.runs or looked.runs[0][0] != self.store.tier.name:
            return None
        keys = keys[: looked.runs[0][1]]
        return self._acquired(self.store.session(session_id), self.store.acquire(session_id, keys, ttl_s), keys, Brought())

    async def pin(self, session_id: str, owner: str, keys: Sequence[bytes], ttl_s: float, max_wait_s: float) -> tuple[int, int, int, bool]:
        """Keeps the leading keys. -> (pin id or 0, blocks, bytes, whether the quotas allowed fewer than there are)"""
        session = self.store.session(session_id)
        async with self._bringing(session, keys, max_wait_s):
            blocks = self.store.tier.leading(keys, session.layout_digest)
            pin = self.store.pins.add(owner, blocks, ttl_s)
        num_kept = len(pin.loan.blocks) if pin else 0
        return (pin.pin_id if pin else 0), num_kept, (pin.num_bytes if pin else 0), num_kept < len(blocks)

    def snapshots(self) -> list[WatchEvent]:
        """What each tier of this node has, as of one sequence number."""
        dram = self.store.snapshot()
        if self.disk is None:
            return [dram]
        return [dram, dram._replace(tier="disk", added=[BlockKey(key) for key in self.disk.stored_keys()])]

    def stat(self) -> StoreStat:
        disk = self.disk
        stat = self.store.stat()
        misses = self.store.accesses.num_misses
        not_found = misses[MissReason.COLD] + misses[MissReason.EVICTED]  # by lookups: nobody acquires those
        num_peers = sum(peer.is_watched for peer in self.peers.peers)
        stat = stat._replace(missed_blocks=stat.missed_blocks + not_found, num_peers=num_peers)
        if disk is None:
            return stat
        return stat._replace(disk_blocks=len(disk), disk_bytes=disk.stored_bytes, disk_total_bytes=disk.num_bytes)

    def set_peers(self, addresses: Sequence[str]) -> None:
        """Its own address among them is left out. ValueError when one is not HOST:PORT."""
        own = self.peer_server.address if self.peer_server is not None else ""
        for address in addresses:
            if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
                raise ValueError(f"addresses: must be HOST:PORT, not {address!r}")
        self.peers.set_peers([address for address in addresses if address != own])

    async def check(self) -> list[str]:
        """Every violated invariant, in words, of the arena and the disk. The disk's rows are read on a thread."""
        return self.store.check() + (await asyncio.to_thread(self.disk.check) if self.disk is not None else [])

    def settle(self) -> None:
        """After every call: what the call has left to do in the background."""
        if self.spiller is not None:
            self.spiller.advance()

    @contextlib.asynccontextmanager
    async def bringing_own(self, keys: Sequence[bytes], layout: bytes, max_wait_s: float) -> AsyncIterator[None]:
        """For a peer: what this node's disk has comes up, what only other peers have does not."""
        shape = self._shape_of(keys, layout)
        if shape is None or self.disk is None:
            yield
            return
        async with self.promoter.bringing(keys, shape, self._loop.time() + max_wait_s, sources=[self.disk]):
            yield

    def _shape_of(self, keys: Sequence[bytes], layout: bytes) -> Shape | None:
        """What blocks of a layout look like, by the first of these keys; None when it is not here."""
        blocks = self.store.tier.leading(keys[:1], layout)
        if blocks:
            return Shape(layout, blocks[0].num_bytes, len(blocks[0].checksums))
        described = self.disk.describe(keys[0], layout) if keys and self.disk is not None else None
        return Shape(layout, described.num_bytes, len(described.checksums) // CHECKSUM_BYTES) if described else None

    def _bringing(self, session: Session, keys: Sequence[bytes], max_wait_s: float) -> contextlib.AbstractAsyncContextManager[Brought]:
        layout = session.layout
        shape = Shape(session.layout_digest, layout.block_bytes, layout.num_parts)
        block_s = layout.block_size / session.tokens_per_s if session.tokens_per_s > 0 else 0.0
        return self.promoter.bringing(keys, shape, self._loop.time() + max_wait_s, block_s)

    def _acquired(self, session: Session, pinned: Pinned, keys: Sequence[bytes], brought: Brought) -> Acquired:
        """Counts, and keeps the disk's copies as warm as the arena's."""
        runs: Runs = []
        shortfall = brought.shortfall if len(pinned.blocks) < len(keys) else None
        if self.disk is not None and self.spiller is not None:
            for key in self.disk.touch(keys[: len(pinned.blocks)], session.layout_digest):
                self.spiller.stored(key)
        for key in keys[: len(pinned.blocks)]:
            tier = brought.tiers.get(key, "dram")
            if runs and runs[-1][0] == tier:
                runs[-1] = (tier, runs[-1][1] + 1)
            else:
                runs.append((tier, 1))
        for tier, count in runs:
            self.store.accesses.num_hits[tier] += count
        if shortfall is not None:
            self.store.accesses.num_misses[shortfall] += len(keys) - len(pinned.blocks)
        return Acquired(pinned, runs, shortfall)


def _first(runs: Runs, num_blocks: int) -> Runs:
    """The runs of the leading blocks only."""
    kept: Runs = []
    for tier, count in runs:
        if num_blocks > 0:
            kept.append((tier, min(count, num_blocks)))
        num_blocks -= count
    return kept
