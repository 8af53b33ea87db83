"""A tier in a dict: slow, obvious, the oracle of the tier contract."""

from __future__ import annotations

from collections.abc import Sequence

from cache_store.config import GRANULE_BYTES, StoreConfig
from cache_store.tiers.base import TierBlock


class MemoryTier:
    """Keeps blocks in the order of their last access, and evicts the first that has no child."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._blocks: dict[bytes, TierBlock] = {}

    def find(self, keys: Sequence[bytes], layout: bytes) -> int:
        found = 0
        while found < len(keys) and keys[found] in self._blocks and self._blocks[keys[found]].layout == layout:
            found += 1
        return found

    def read(self, key: bytes, layout: bytes) -> TierBlock | None:
        if not self.find([key], layout):
            return None
        self._blocks[key] = block = self._blocks.pop(key)
        return block

    def write(self, block: TierBlock) -> bool:
        if _room(block) > self._memory_bytes:
            raise ValueError(f"a block of {len(block.data)} bytes is larger than the tier")
        if block.key in self._blocks:
            self._blocks[block.key] = self._blocks.pop(block.key)
            return True
        if block.parent is not None and not self.find([block.parent], block.layout):
            return False
        while sum(map(_room, self._blocks.values())) + _room(block) > self._memory_bytes:
            victim = next((key for key in self._blocks if key != block.parent and not self._has_children(key)), None)
            if victim is None:
                return False
            del self._blocks[victim]
        self._blocks[block.key] = block
        return True

    def discard(self, key: bytes) -> bool:
        if key not in self._blocks or self._has_children(key):
            return False
        del self._blocks[key]
        return True

    def __len__(self) -> int:
        return len(self._blocks)

    def check(self) -> list[str]:
        parents = {block.parent for block in self._blocks.values()} - {None}
        return [f"the parent {parent.hex()} is missing" for parent in parents if parent is not None and parent not in self._blocks]

    def close(self) -> None:
        self._blocks.clear()

    def _has_children(self, key: bytes) -> bool:
        return any(block.parent == key for block in self._blocks.values())


def _room(block: TierBlock) -> int:
    return -(-len(block.data) // GRANULE_BYTES) * GRANULE_BYTES


def open_memory(config: StoreConfig) -> MemoryTier:
    return MemoryTier(config.memory_bytes)
