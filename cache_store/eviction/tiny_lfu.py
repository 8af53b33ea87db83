"""W-TinyLFU: a window for what is new, and a vote of estimated frequencies over who may stay behind it."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable

from cache_store.eviction.base import RankHeap

SHARE_OF_WINDOW = 0.01  # of all blocks
SHARE_OF_PROTECTED = 0.8  # of the others
MAX_COUNT = 15
MIN_COUNTERS = 1024
ACCESSES_PER_COUNTER = 10  # between two halvings of all counts
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)


class _Sketch:
    """Count-min: four counters per key, of which the lowest is closest to the truth; halved now and then, so that old uses fade."""

    def __init__(self, num_counters: int) -> None:
        self.num_counters = num_counters
        self._rows = [array("B", bytes(num_counters)) for _ in MULTIPLIERS]
        self._until_halving = ACCESSES_PER_COUNTER * num_counters

    def add(self, key: bytes) -> None:
        for row, place in zip(self._rows, self._places(key), strict=True):
            if row[place] < MAX_COUNT:
                row[place] += 1
        self._until_halving -= 1
        if not self._until_halving:
            self._until_halving = ACCESSES_PER_COUNTER * self.num_counters // 2
            self._rows = [array("B", [count >> 1 for count in row]) for row in self._rows]

    def count(self, key: bytes) -> int:
        return min(row[place] for row, place in zip(self._rows, self._places(key), strict=True))

    def _places(self, key: bytes) -> list[int]:
        number = int.from_bytes(key, "little")
        number ^= number >> 64
        return [((number * multiplier & (1 << 64) - 1) >> 32) % self.num_counters for multiplier in MULTIPLIERS]


class TinyLfu:
    """G. Einziger, R. Friedman, B. Manes: TinyLFU: a highly efficient cache admission policy, ACM TOS 2017.

    Window (LRU), probation and protected (a segmented LRU). When the window is too large, its coldest block and the coldest on probation
    are compared: the one of the lower frequency goes, and a winner from the window is on probation from then on.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._ranks: dict[bytes, int] = {}
        self._segment: dict[bytes, int] = {}  # 0 window, 1 probation, 2 protected
        self._sizes = [0, 0, 0]
        self._exposed = [RankHeap(), RankHeap(), RankHeap()]
        self._sketch = _Sketch(MIN_COUNTERS)
        self._winner: bytes | None = None  # of the last comparison, from the window
        self._is_growing = True  # nothing was evicted since the last admission: the window's surplus needs no comparison

    def admitted(self, key: bytes, parent: bytes | None = None) -> None:
        if len(self._ranks) >= self._sketch.num_counters:
            self._sketch = _Sketch(4 * self._sketch.num_counters)
        self._sketch.add(key)
        self._ranks[key] = next(self._numbers)
        self._segment[key] = 0
        self._sizes[0] += 1
        while self._is_growing and self._window_is_full and (coldest := self._exposed[0].lowest()):
            self._move(coldest[1], 1)
        self._is_growing = True

    def accessed(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._sketch.add(key)
            self._ranks[key] = next(self._numbers)
            segment = self._segment[key]
            self._move(key, 2 if segment else 0)
        most = SHARE_OF_PROTECTED * (len(self._ranks) - self._sizes[0])
        while self._sizes[2] > most and (coldest := self._exposed[2].lowest()):
            self._move(coldest[1], 1)

    def exposed(self, key: bytes) -> None:
        heap = self._exposed[self._segment[key]]
        if key not in heap:
            heap.put(key, self._ranks[key])

    def shielded(self, key: bytes) -> None:
        self._exposed[self._segment[key]].discard(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:
        winner, self._winner = self._winner, None
        self._is_growing = False
        if evicted and winner is not None and winner != key and self._segment.get(winner) == 0:
            self._move(winner, 1)
        self.shielded(key)
        self._sizes[self._segment.pop(key)] -= 1
        del self._ranks[key]

    def victim(self) -> bytes | None:
        self._winner = None
        window, probation, protected = (heap.lowest() for heap in self._exposed)
        main = probation or protected
        if window is None or main is None or not self._window_is_full:
            chosen = main or window
            return chosen[1] if chosen else None
        if self._sketch.count(window[1]) > self._sketch.count(main[1]):
            self._winner = window[1]
            return main[1]
        return window[1]

    @property
    def _window_is_full(self) -> bool:
        return self._sizes[0] > SHARE_OF_WINDOW * len(self._ranks)

    def _move(self, key: bytes, segment: int) -> None:
        old = self._segment[key]
        is_exposed = key in self._exposed[old]
        self._exposed[old].discard(key)
        self._sizes[old] -= 1
        self._sizes[segment] += 1
        self._segment[key] = segment
        if is_exposed:
            self._exposed[segment].put(key, self._ranks[key])
