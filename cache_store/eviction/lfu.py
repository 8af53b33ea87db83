"""Least frequently used, with aging; and the same with the cost of computing a block again."""

from __future__ import annotations

from cache_store.eviction.base import Ranked

NUM_BLOCKS_OF_DOUBLE_COST = 512  # a block so deep costs twice as much as a first one, because of attention


class Lfu(Ranked):
    """LFU with dynamic aging: rank = count + age, where age is the rank of the last victim, so that old fame fades.

    M. Arlitt, L. Cherkasova, J. Dilley, R. Friedrich, T. Jin: Evaluating content management techniques for web proxy caches, 2000.
    Among equal ranks the least recently used goes first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0
        self._number = 0
        self._counts: dict[bytes, int] = {}

    def cost(self, key: bytes) -> float:
        return 1.0

    def rank(self, key: bytes, parent: bytes | None) -> tuple[float, int]:
        self._counts[key] = 0
        return self.rank_again(key)

    def rank_again(self, key: bytes) -> tuple[float, int]:
        self._counts[key] += 1
        self._number += 1
        return self._age + self._counts[key] * self.cost(key), self._number

    def removed(self, key: bytes, *, evicted: bool) -> None:
        if evicted:
            self._age = max(self._age, self._ranks[key][0])
        del self._counts[key]
        super().removed(key, evicted=evicted)


class Gdsf(Lfu):
    """Greedy dual size frequency: rank = age + count * cost / size.

    L. Cherkasova: Improving WWW proxies performance with greedy-dual-size-frequency caching policy, HP Labs, 1998.
    Blocks of one policy have one size; the cost of computing one grows with its depth, as every token attends to all before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depths: dict[bytes, int] = {}

    def cost(self, key: bytes) -> float:
        return 1.0 + self._depths[key] / NUM_BLOCKS_OF_DOUBLE_COST

    def rank(self, key: bytes, parent: bytes | None) -> tuple[float, int]:
        self._depths[key] = self._depths.get(parent, -1) + 1 if parent is not None else 0
        return super().rank(key, parent)

    def removed(self, key: bytes, *, evicted: bool) -> None:
        super().removed(key, evicted=evicted)
        del self._depths[key]
