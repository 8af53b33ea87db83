"""S3-FIFO: three first-in-first-out queues, and a small counter per block instead of an order by last use."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from cache_store.eviction.base import Ghosts, RankHeap

SHARE_OF_SMALL = 0.1  # of all blocks
MAX_COUNT = 3


class S3Fifo:
    """J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi: FIFO queues are all you need for cache eviction, SOSP 2023.

    New blocks enter the small queue, known ghosts the main one. At the head of the small queue a block used more than once since moves to
    the main queue, another is evicted and becomes a ghost. At the head of the main queue a used block goes round once more.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._ranks: dict[bytes, int] = {}
        self._counts: dict[bytes, int] = {}
        self._small: set[bytes] = set()
        self._exposed_small, self._exposed_main = RankHeap(), RankHeap()
        self._ghosts = Ghosts()

    def admitted(self, key: bytes, parent: bytes | None = None) -> None:
        self._ranks[key] = next(self._numbers)
        self._counts[key] = 0
        if not self._ghosts.take(key):
            self._small.add(key)

    def accessed(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._counts[key] = min(self._counts[key] + 1, MAX_COUNT)

    def exposed(self, key: bytes) -> None:
        heap = self._exposed_small if key in self._small else self._exposed_main
        if key not in heap:
            heap.put(key, self._ranks[key])

    def shielded(self, key: bytes) -> None:
        self._exposed_small.discard(key)
        self._exposed_main.discard(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:
        self.shielded(key)
        del self._ranks[key]
        del self._counts[key]
        if key in self._small:
            self._small.discard(key)
            if evicted:
                self._ghosts.add(key, len(self._ranks) - len(self._small) + 1)

    def victim(self) -> bytes | None:
        """Every turn of a queue takes from a count, so the turns of all calls are fewer than the accesses."""
        while True:
            small, main = self._exposed_small.lowest(), self._exposed_main.lowest()
            if small and (not main or len(self._small) > SHARE_OF_SMALL * len(self._ranks)):
                key = small[1]
                if self._counts[key] <= 1:
                    return key
                self._small.discard(key)
                self._exposed_small.discard(key)
                self._counts[key] = 0
            elif main:
                key = main[1]
                if not self._counts[key]:
                    return key
                self._counts[key] -= 1
            else:
                return None
            self._ranks[key] = next(self._numbers)
            self._exposed_main.put(key, self._ranks[key])
