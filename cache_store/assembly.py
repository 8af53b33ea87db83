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
from collections import deque
from collections.abc import AsyncIterator, Callable

from cache_store.arena import Arena
from cache_store.config import StoreConfig
from cache_store.metrics import MetricsServer
from cache_store.node import StoreNode
from cache_store.peer_server import PeerServer
from cache_store.pricing import Ledger
from cache_store.processes import PidfdWatcher
from cache_store.promote import Promoter, Source
from cache_store.spill import Spiller
from cache_store.store import Store
from cache_store.tiers.disk import DiskTier
from cache_store.tiers.dram import DramTier
from cache_store.tiers.peer import PeerTier
from cache_store.watch import ChangeLog, EventFeed


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
            stack.push_async_callback(asyncio.to_thread, MetricsServer(node, config.metrics_address).close)
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
