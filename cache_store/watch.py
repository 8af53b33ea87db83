"""What enters and leaves the store, for those who watch. Queues are bounded: a slow watcher loses events, not the store its memory."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Iterator

from cache_store.errors import StoreRefused
from cache_store.keys import BlockKey
from cache_store.outcomes import WatchEvent

SNAPSHOT_KEYS = 1 << 16  # per event

Watcher = asyncio.Queue[WatchEvent] | queue.Queue[WatchEvent | None]


class ChangeLog:
    """Numbers what becomes visible and what stops being so, per tier, in the order in which it happens."""

    def __init__(self, epoch: str, listener: Callable[[WatchEvent], None]) -> None:
        self.sequence = 0
        self._epoch, self._listener = epoch, listener
        self._kind = ("", False)  # tier, and whether keys were added
        self._keys: list[BlockKey] = []

    def stored(self, tier: str, key: bytes) -> None:
        self._note((tier, True), key)

    def removed(self, tier: str, key: bytes) -> None:
        self._note((tier, False), key)

    def flush(self) -> None:
        """Tells the listener what was noted since the last flush."""
        if self._keys:
            self.sequence += 1
            keys, self._keys = self._keys, []
            tier, added = self._kind
            self._listener(WatchEvent(self.sequence, self._epoch, tier, keys if added else [], [] if added else keys))

    def _note(self, kind: tuple[str, bool], key: bytes) -> None:
        if kind != self._kind:
            self.flush()  # an event speaks of one tier, and does not add and remove one key
            self._kind = kind
        self._keys.append(BlockKey(key))


class EventFeed:
    """`publish` and `watch` belong to one loop."""

    def __init__(self, max_watchers: int, queue_events: int) -> None:
        self._max_watchers = max_watchers
        self._queue_events = queue_events
        self._queues: set[Watcher] = set()

    def publish(self, event: WatchEvent) -> None:
        for watcher in self._queues:
            if watcher.full():
                with contextlib.suppress(queue.Empty):  # its thread was quicker
                    watcher.get_nowait()  # the oldest, so that what the watcher reads next shows the gap
            watcher.put_nowait(event)

    def subscribe(self) -> asyncio.Queue[WatchEvent]:
        """Events from now on. StoreRefused when there are too many watchers. `unsubscribe` when done."""
        watcher: asyncio.Queue[WatchEvent] = asyncio.Queue(self._queue_events)
        self.add(watcher)
        return watcher

    def add(self, watcher: Watcher) -> None:
        """As `subscribe`, with a queue of the watcher's own, which may be one for threads."""
        if len(self._queues) >= self._max_watchers:
            raise StoreRefused(f"there are {self._max_watchers} watchers already")
        self._queues.add(watcher)

    def unsubscribe(self, watcher: Watcher) -> None:
        self._queues.discard(watcher)


def pieces(snapshot: WatchEvent) -> Iterator[WatchEvent]:
    """A snapshot as one or more events of bounded size."""
    for start in range(0, max(1, len(snapshot.added)), SNAPSHOT_KEYS):
        yield snapshot._replace(added=snapshot.added[start : start + SNAPSHOT_KEYS])
