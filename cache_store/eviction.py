"""Which block to give up when a slot is needed. A policy chooses; the tier that owns the blocks acts.

Leaf first: a block is exposed (may be the victim) only while it has no child and nobody has pinned it. The tier says when that changes.
A new policy is a class with these methods and a line in EVICTION; tests/contracts/test_eviction.py runs over every entry.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Protocol


class EvictionPolicy(Protocol):
    """Every call costs O(1) or O(log n) per key. Keys passed to anything but `admitted` are present."""

    def admitted(self, key: bytes) -> None:
        """A block became visible; it is not exposed yet, and was accessed now."""
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
        """The exposed block to give up next; None when no block is exposed. Changes nothing: `removed` follows, or not."""
        ...


class Lru:
    """The exposed block whose last access is the longest ago.

    Accesses are numbered. A heap of (number, key) finds the lowest one; an entry that an access or a shield has outdated is skipped when it
    comes up, and the heap is rebuilt when such entries outnumber the others. A block that becomes exposed late, because its child was
    evicted, so takes the place that its own last access gives it.
    """

    def __init__(self) -> None:
        self._num_accesses = 0
        self._last_access: dict[bytes, int] = {}
        self._exposed: set[bytes] = set()
        self._heap: list[tuple[int, bytes]] = []

    def admitted(self, key: bytes) -> None:
        self._num_accesses += 1
        self._last_access[key] = self._num_accesses

    def accessed(self, keys: Iterable[bytes]) -> None:
        number, last_access, exposed = self._num_accesses, self._last_access, self._exposed
        for key in keys:
            number += 1
            last_access[key] = number
            if key in exposed:
                self._push(key)
        self._num_accesses = number

    def exposed(self, key: bytes) -> None:
        if key not in self._exposed:
            self._exposed.add(key)
            self._push(key)

    def shielded(self, key: bytes) -> None:
        self._exposed.discard(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:
        self._exposed.discard(key)
        del self._last_access[key]

    def victim(self) -> bytes | None:
        while self._heap:
            number, key = self._heap[0]
            if key in self._exposed and self._last_access[key] == number:
                return key
            heapq.heappop(self._heap)
        return None

    def _push(self, key: bytes) -> None:
        heapq.heappush(self._heap, (self._last_access[key], key))
        if len(self._heap) > 2 * len(self._exposed) + 64:
            self._heap = [(self._last_access[key], key) for key in self._exposed]
            heapq.heapify(self._heap)


EVICTION: dict[str, Callable[[], EvictionPolicy]] = {"lru": Lru}
