"""Least recently used."""

from __future__ import annotations

import itertools

from cache_store.eviction.base import Ranked


class Lru(Ranked):
    """The exposed block whose last access is the longest ago: accesses are numbered, and the number is the rank."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count(1)

    def rank(self, key: bytes, parent: bytes | None) -> int:
        return next(self._numbers)

    def rank_again(self, key: bytes) -> int:
        return next(self._numbers)
