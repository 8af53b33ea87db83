"""Which block to give up when a slot is needed. A policy chooses; the tier that owns the blocks acts.

Leaf first: a block is exposed (may be the victim) only while it has no child and nobody has pinned it. The tier says when that changes.
A new policy is a file with a class that has the methods of `base.EvictionPolicy`, and a line in EVICTION; tests/contracts/test_eviction.py
runs over every entry, and `mobula cache replay` compares them on a trace.
"""

from __future__ import annotations

from collections.abc import Callable

from cache_store.eviction.arc import Arc
from cache_store.eviction.base import EvictionPolicy as EvictionPolicy
from cache_store.eviction.hit_density import HitDensity
from cache_store.eviction.lfu import Gdsf, Lfu
from cache_store.eviction.lru import Lru as Lru
from cache_store.eviction.s3_fifo import S3Fifo
from cache_store.eviction.tiny_lfu import TinyLfu
from cache_store.eviction.two_queue import TwoQueue

EVICTION: dict[str, Callable[[], EvictionPolicy]] = {
    "hit-density": HitDensity,
    "lru": Lru,
    "lfu": Lfu,
    "gdsf": Gdsf,
    "2q": TwoQueue,
    "arc": Arc,
    "s3-fifo": S3Fifo,
    "w-tinylfu": TinyLfu,
}
DEFAULT_EVICTION = "hit-density"
