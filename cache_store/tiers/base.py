"""What every tier of the store can do: hold whole blocks by key.

`TIERS` names the implementations; `tests/contracts/test_tiers.py` holds each of them against `memory`, the obvious one. A new tier is a
file and a line. The DRAM tier can do more, because engines write into its slots themselves: see `tiers/dram.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cache_store.config import StoreConfig


class TierBlock(NamedTuple):
    """A block on its way between tiers."""

    key: bytes
    parent: bytes | None  # None: the first block of its sequence
    layout: bytes  # digest of its layout
    checksums: bytes  # xxh3-64 of each part, little-endian
    data: bytes | memoryview


class Tier(Protocol):
    """Leaf first: a block with children is neither evicted nor discarded before them."""

    def find(self, keys: Sequence[bytes], layout: bytes) -> int:
        """How many leading keys are here under that layout. Not an access."""
        ...

    def read(self, key: bytes, layout: bytes) -> TierBlock | None:
        """A copy of a block. An access."""
        ...

    def write(self, block: TierBlock) -> bool:
        """Keeps a copy, evicting others for it. True also for a block that is here already: an access. False when there is no room, or its
        parent is not here. ValueError when the block is larger than this tier can ever hold."""
        ...

    def discard(self, key: bytes) -> bool:
        """Forgets a block. False when it is not here or may not go: it has children, or is in use."""
        ...

    def __len__(self) -> int:
        """Blocks that `find` can find."""
        ...

    def check(self) -> list[str]:
        """Every violated invariant, in words."""
        ...

    def close(self) -> None: ...


TIERS = {
    "disk": "cache_store.tiers.disk:open_disk",
    "dram": "cache_store.tiers.dram:open_dram",
    "memory": "cache_store.tiers.memory:open_memory",
}


def open_tier(name: str, config: StoreConfig) -> Tier:
    """The tier of that name in TIERS, ready for use, with `config.memory_bytes` of room, or `config.disk_bytes`. Its caller closes it."""
    module, _, function = TIERS[name].partition(":")
    tier: Tier = getattr(importlib.import_module(module), function)(config)
    return tier
