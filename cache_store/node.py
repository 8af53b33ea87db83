"""One node's store with all its parts, and who owns what.

    Arena <- DramTier <- Store                    the state machine, on the loop
             DiskTier <- Spiller (one thread)     copies down what becomes visible
                      <- Promoter (threads)       brings up what is asked for
             PeerTier <-                          other nodes' stores, as one more source
             PeerServer (threads of its own)      what this store lends to them

Everything that can take long happens on threads; the loop only keeps the books.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from cache_store.accesses import MissReason
from cache_store.arena import Arena
from cache_store.checksums import CHECKSUM_BYTES
from cache_store.config import StoreConfig
from cache_store.errands import Shape
from cache_store.keys import BlockKey
from cache_store.leases import Session
from cache_store.metrics import MetricsServer
from cache_store.outcomes import Pinned, StoreStat, WatchEvent
from cache_store.peer_server import PeerServer
from cache_store.pricing import Ledger
from cache_store.processes import PidfdWatcher
from cache_store.promote import Brought, Promoter, Source
from cache_store.spill import Spiller
from cache_store.store import Store
from cache_store.tiers.disk import DiskTier
from cache_store.tiers.dram import DramTier
from cache_store.tiers.peer import PeerTier
from cache_store.watch import ChangeLog, EventFeed

log = logging.getLogger(__name__)

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
    """The store as its service sees it. Made by `opened`, on the loop that uses it."""

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

    def look_up(self, session_id: str, keys: Sequence[bytes], tokens_per_s: float) -> Looked:
        """Which tiers have the leading keys, as far as bringing them is cheaper than computing them."""
        session = self.store.session(session_id)
        session.tokens_per_s = tokens_per_s
        found = self.promoter.runs(keys, session.layout_digest)
        num_found = sum(count for _, count in found)
        choice = self.ledger.choose(found, session.layout.block_bytes, session.layout.block_size, tokens_per_s)
        reason = self.store.accesses.looked_up(session_id, keys, num_found)
        num_refused = num_found - choice.num_blocks
        return Looked(_first(found, choice.num_blocks), num_refused, MissReason.CHEAPER_TO_COMPUTE if num_refused else reason)

    async def acquire(self, session_id: str, keys: Sequence[bytes], ttl_s: float, max_wait_s: float) -> Acquired:
        """Pins the leading keys that are in the arena, or come there within `max_wait_s`."""
        session = self.store.session(session_id)
        if max_wait_s <= 0 or not self.promoter.sources or self.store.tier.find(keys, session.layout_digest) == len(keys):
            pinned = self.store.acquire(session_id, keys, ttl_s)
            return self._counted(pinned, keys, {}, None)
        async with self._bringing(session, keys, max_wait_s) as brought:
            pinned = self.store.acquire(session_id, keys, ttl_s)
            return self._counted(pinned, keys, brought.tiers, brought.shortfall if len(pinned.blocks) < len(keys) else None)

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

    def _counted(self, pinned: Pinned, keys: Sequence[bytes], tiers: dict[bytes, str], shortfall: MissReason | None) -> Acquired:
        runs: Runs = []
        for key in keys[: len(pinned.blocks)]:
            tier = tiers.get(key, "dram")
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


@contextlib.asynccontextmanager
async def opened(config: StoreConfig) -> AsyncIterator[StoreNode]:
    """A store with the tiers that its settings name. StoreError when one of them cannot be opened."""
    loop = asyncio.get_running_loop()
    feed = EventFeed(config.max_watchers, config.watch_queue_events)
    async with contextlib.AsyncExitStack() as stack:
        disk = None
        if config.disk_bytes:
            changes = _DiskChanges(loop, lambda: store.changes)
            disk = DiskTier(
                config.disk_directory, config.disk_bytes, config.extent_bytes, on_stored=changes.stored, on_removed=changes.removed
            )
            stack.callback(disk.close)
        arena = stack.enter_context(Arena.create(config.directory, config.memory_bytes, config.extent_bytes))
        spilled = _Spilled()
        store = Store(
            config,
            lambda stored, removed: _open_dram(arena, config, loop, spilled, stored, removed),
            PidfdWatcher(loop),
            loop.time,
            feed.publish,
        )
        stack.callback(store.tier.close)
        stack.callback(store.close)
        store.tier.grow()  # the first extent now, so that nobody who is let in finds no space
        if disk is not None:
            spilled.spiller = Spiller(store.tier, disk, store.errands, loop.call_soon_threadsafe)
            stack.callback(spilled.spiller.close)
        ledger = Ledger(loop.time)
        peers = PeerTier(config.secret)
        sources: list[Source] = [disk, peers] if disk is not None else [peers]
        promoter = Promoter(store.tier, store.errands, sources, ledger, store.changes.flush, config.load_timeout_s)
        stack.push_async_callback(promoter.close)
        node = StoreNode(config, store, feed, promoter, peers, disk, spilled.spiller)
        if config.peer_address:
            node.peer_server = PeerServer(node, config.peer_address, config.secret)
            stack.callback(node.peer_server.tickets.close)
            stack.push_async_callback(asyncio.to_thread, node.peer_server.close)
        if config.metrics_address:
            stack.callback(MetricsServer(node, config.metrics_address).close)
        node.set_peers(config.peers)
        if disk is not None:
            restoring = asyncio.ensure_future(asyncio.to_thread(disk.restore))
            restoring.add_done_callback(lambda _: node.settle())
        stack.push_async_callback(asyncio.to_thread, peers.close)
        yield node


class _Spilled:
    """Hears of the arena's changes before the spiller exists."""

    spiller: Spiller | None = None

    def stored(self, key: bytes) -> None:
        if self.spiller is not None:
            self.spiller.stored(key)

    def removed(self, key: bytes) -> None:
        if self.spiller is not None:
            self.spiller.removed(key)


def _open_dram(
    arena: Arena,
    config: StoreConfig,
    loop: asyncio.AbstractEventLoop,
    spilled: _Spilled,
    on_stored: Callable[[bytes], None],
    on_removed: Callable[[bytes], None],
) -> DramTier:
    def stored(key: bytes) -> None:
        on_stored(key)
        spilled.stored(key)

    def removed(key: bytes) -> None:
        on_removed(key)
        spilled.removed(key)

    return DramTier(arena, config, loop.time, on_stored=stored, on_removed=removed)


class _DiskChanges:
    """Carries the disk tier's changes from its threads to the store's log, many at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log_of: Callable[[], ChangeLog]) -> None:
        self._loop, self._log_of = loop, log_of
        self._changes: deque[tuple[bytes, bool]] = deque()
        self._is_posted = False

    def stored(self, key: bytes) -> None:
        self._note(key, True)

    def removed(self, key: bytes) -> None:
        self._note(key, False)

    def _note(self, key: bytes, stored: bool) -> None:
        """On whichever thread; the tier's lock keeps the order."""
        self._changes.append((key, stored))
        if not self._is_posted:
            self._is_posted = True
            self._loop.call_soon_threadsafe(self._publish)

    def _publish(self) -> None:
        self._is_posted = False  # before taking: what is noted from here on posts again
        changes = self._log_of()
        for _ in range(len(self._changes)):
            key, stored = self._changes.popleft()
            (changes.stored if stored else changes.removed)("disk", key)
        changes.flush()
