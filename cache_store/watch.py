"""What enters and leaves the store, for those who watch. Queues are bounded: a slow watcher loses events, not the store its memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from cache_store.errors import StoreRefused
from cache_store.outcomes import WatchEvent

SNAPSHOT_KEYS = 1 << 16  # per event


class EventFeed:
    """`publish` and `watch` belong to one loop."""

    def __init__(self, max_watchers: int, queue_events: int) -> None:
        self._max_watchers = max_watchers
        self._queue_events = queue_events
        self._queues: set[asyncio.Queue[WatchEvent]] = set()

    def publish(self, event: WatchEvent) -> None:
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()  # the oldest, so that what the watcher reads next shows the gap
            queue.put_nowait(event)

    def subscribe(self) -> asyncio.Queue[WatchEvent]:
        """Events from now on. StoreRefused when there are too many watchers. `unsubscribe` when done."""
        if len(self._queues) >= self._max_watchers:
            raise StoreRefused(f"there are {self._max_watchers} watchers already")
        queue: asyncio.Queue[WatchEvent] = asyncio.Queue(self._queue_events)
        self._queues.add(queue)
        return queue

    def unsubscribe(self, queue: asyncio.Queue[WatchEvent]) -> None:
        self._queues.discard(queue)


def pieces(snapshot: WatchEvent) -> Iterator[WatchEvent]:
    """A snapshot as one or more events of bounded size."""
    for start in range(0, max(1, len(snapshot.added)), SNAPSHOT_KEYS):
        yield snapshot._replace(added=snapshot.added[start : start + SNAPSHOT_KEYS])
