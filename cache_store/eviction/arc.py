"""ARC: recency and frequency share the room, and ghosts of both move the border."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from cache_store.eviction.base import Ghosts, RankHeap


class Arc:
    """N. Megiddo, D. Modha: ARC: a self-tuning, low overhead replacement cache, FAST 2003.

    T1 holds blocks used once lately, T2 those used again; B1 and B2 remember the keys evicted from them. A key that comes back from B1
    says that T1 was too small, one from B2 the opposite. The room `c` is as many blocks as are present.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._ranks: dict[bytes, int] = {}
        self._t1: set[bytes] = set()
        self._exposed_t1, self._exposed_t2 = RankHeap(), RankHeap()
        self._b1, self._b2 = Ghosts(), Ghosts()
        self._target_t1 = 0.0
        self._last_from_b2 = False

    def admitted(self, key: bytes, parent: bytes | None = None) -> None:
        room = len(self._ranks) + 1
        num_b1, num_b2 = len(self._b1), len(self._b2)
        self._last_from_b2 = False
        if self._b1.take(key):
            self._target_t1 = min(self._target_t1 + max(num_b2 / num_b1, 1.0), room)
        elif self._b2.take(key):
            self._target_t1 = max(self._target_t1 - max(num_b1 / num_b2, 1.0), 0.0)
            self._last_from_b2 = True
        else:
            self._t1.add(key)
        self._ranks[key] = next(self._numbers)

    def accessed(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            rank = self._ranks[key] = next(self._numbers)
            self._t1.discard(key)
            if key in self._exposed_t1:
                self._exposed_t1.discard(key)
                self._exposed_t2.put(key, rank)
            elif key in self._exposed_t2:
                self._exposed_t2.put(key, rank)

    def exposed(self, key: bytes) -> None:
        heap = self._exposed_t1 if key in self._t1 else self._exposed_t2
        if key not in heap:
            heap.put(key, self._ranks[key])

    def shielded(self, key: bytes) -> None:
        self._exposed_t1.discard(key)
        self._exposed_t2.discard(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:
        self.shielded(key)
        del self._ranks[key]
        was_in_t1 = key in self._t1
        self._t1.discard(key)
        if evicted:
            room = len(self._ranks) + 1
            (self._b1 if was_in_t1 else self._b2).add(key, room)
            self._b1.trim(room - len(self._t1))
            self._b2.trim(2 * room - len(self._ranks) - len(self._b1))

    def victim(self) -> bytes | None:
        t1, t2 = self._exposed_t1.lowest(), self._exposed_t2.lowest()
        num_t1 = len(self._t1)
        from_t1 = num_t1 > self._target_t1 or (self._last_from_b2 and num_t1 == int(self._target_t1))
        chosen = (t1 or t2) if from_t1 else (t2 or t1)
        return chosen[1] if chosen else None
