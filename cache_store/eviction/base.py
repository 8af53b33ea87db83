"""What a tier and an eviction policy say to each other, and what the policies are built of."""

from __future__ import annotations

import abc
import heapq
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Protocol


class EvictionPolicy(Protocol):
    """Every call costs O(1) or O(log n) per key, amortised. Keys passed to anything but `admitted` are present."""

    def admitted(self, key: bytes, parent: bytes | None = None) -> None:
        """A block became visible behind `parent` (None: the first of its sequence); it is not exposed yet, and was accessed now."""
        ...

    def accessed(self, keys: Iterable[bytes]) -> None:
        """Blocks were used, in this order. Callers pass children before parents, so that a leaf is colder than what it needs."""
        ...

    def exposed(self, key: bytes) -> None: ...

    def shielded(self, key: bytes) -> None:
        """Not exposed any more. Allowed on a key that was not."""
        ...

    def removed(self, key: bytes, *, evicted: bool) -> None:
        """The block is gone: as a victim, which a policy with memory may want to recognise, or for another reason."""
        ...

    def victim(self) -> bytes | None:
        """The exposed block to give up next; None when no block is exposed. Asked again it says the same: `removed` follows, or not."""
        ...


class RankHeap:
    """Keys by rank, lowest first. Any mutually comparable ranks will do.

    A heap of (rank, key): an entry that a later `put` or `discard` has outdated is skipped when it comes up, and the heap is rebuilt when
    such entries outnumber the others. `put` and `discard` cost O(log n), amortised.
    """

    def __init__(self) -> None:
        self._ranks: dict[bytes, Any] = {}
        self._heap: list[tuple[Any, bytes]] = []

    def __contains__(self, key: bytes) -> bool:
        return key in self._ranks

    def __len__(self) -> int:
        return len(self._ranks)

    def put(self, key: bytes, rank: Any) -> None:
        self._ranks[key] = rank
        heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + 64:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapq.heapify(self._heap)

    def discard(self, key: bytes) -> None:
        self._ranks.pop(key, None)

    def lowest(self) -> tuple[Any, bytes] | None:
        """(rank, key)"""
        heap, ranks = self._heap, self._ranks
        while heap:
            rank, key = heap[0]
            if ranks.get(key) == rank:
                return heap[0]
            heapq.heappop(heap)
        return None


class Ranked(abc.ABC):
    """A policy of one order: every present block has a rank, and the exposed block of the lowest rank goes first.

    A block that becomes exposed late, because its child was evicted, so takes the place that its own rank gives it.
    """

    def __init__(self) -> None:
        self._ranks: dict[bytes, Any] = {}
        self._exposed = RankHeap()

    @abc.abstractmethod
    def rank(self, key: bytes, parent: bytes | None) -> Any:
        """Of a block that is admitted."""

    @abc.abstractmethod
    def rank_again(self, key: bytes) -> Any:
        """Of a block that is accessed."""

    def admitted(self, key: bytes, parent: bytes | None = None) -> None:
        self._ranks[key] = self.rank(key, parent)

    def accessed(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            rank = self._ranks[key] = self.rank_again(key)
            if key in self._exposed:
                self._exposed.put(key, rank)

    def exposed(self, key: bytes) -> None:
        if key not in self._exposed:
            self._exposed.put(key, self._ranks[key])

    def shielded(self, key: bytes) -> None:
        self._exposed.discard(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:
        self._exposed.discard(key)
        del self._ranks[key]

    def victim(self) -> bytes | None:
        lowest = self._exposed.lowest()
        return lowest[1] if lowest else None


class Ghosts:
    """Keys of blocks that are gone, the latest last; at most `limit` of them."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()  # popping the oldest of a dict would cost O(n)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: bytes, limit: int) -> None:
        self._keys.pop(key, None)
        self._keys[key] = None
        self.trim(limit)

    def trim(self, limit: int) -> None:
        while len(self._keys) > max(0, limit):
            self._keys.popitem(last=False)

    def take(self, key: bytes) -> bool:
        """Whether it was there; it is not any more."""
        if key in self._keys:
            del self._keys[key]
            return True
        return False
