"""2Q: blocks that were used once wait in a queue of their own, and only a second use brings them among the hot ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from cache_store.eviction.base import Ghosts, RankHeap

SHARE_OF_NEW = 0.25  # of all blocks: those used once
SHARE_OF_GHOSTS = 0.5  # keys that are remembered after that queue, against all blocks


class TwoQueue:
    """T. Johnson, D. Shasha: 2Q: a low overhead high performance buffer management replacement algorithm, VLDB 1994 (the full version).

    A block enters the queue of new ones, first in first out, and stays there whatever happens. One that comes back after it was evicted
    from there enters the queue of hot ones, which is kept by last use.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._ranks: dict[bytes, int] = {}
        self._new: set[bytes] = set()
        self._exposed_new, self._exposed_hot = RankHeap(), RankHeap()
        self._ghosts = Ghosts()

    def admitted(self, key: bytes, parent: bytes | None = None) -> None:
        self._ranks[key] = next(self._numbers)
        if not self._ghosts.take(key):
            self._new.add(key)

    def accessed(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key not in self._new:
                rank = self._ranks[key] = next(self._numbers)
                if key in self._exposed_hot:
                    self._exposed_hot.put(key, rank)

    def exposed(self, key: bytes) -> None:
        heap = self._exposed_new if key in self._new else self._exposed_hot
        if key not in heap:
            heap.put(key, self._ranks[key])

    def shielded(self, key: bytes) -> None:
        self._exposed_new.discard(key)
        self._exposed_hot.discard(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:
        self.shielded(key)
        del self._ranks[key]
        if key in self._new:
            self._new.discard(key)
            if evicted:
                self._ghosts.add(key, int(SHARE_OF_GHOSTS * len(self._ranks)) + 1)

    def victim(self) -> bytes | None:
        new, hot = self._exposed_new.lowest(), self._exposed_hot.lowest()
        first = new if len(self._new) > SHARE_OF_NEW * len(self._ranks) else hot
        chosen = first or new or hot
        return chosen[1] if chosen else None
