"""What an engine and its ranks do with a store, in one object: it writes blocks whose bytes follow from their keys, and can so tell a wrong
byte from a right one."""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence

import numpy as np

from cache_store.checksums import part_checksums
from cache_store.client import Acquired, Attached, CommitOutcome, ReserveOutcome, Slot, StoreClient
from cache_store.keys import BlockKey, Layout
from tests.cache_store.conftest import ROOT


def content(key: bytes, num_bytes: int) -> bytes:
    return random.Random(key).randbytes(num_bytes)


class ArenaUser:
    """Borrows an attached client. `close` unmaps the arena."""

    def __init__(self, client: StoreClient, attached: Attached, layout: Layout) -> None:
        self.client, self.attached, self.layout = client, attached, layout
        with open(attached.arena_path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), attached.arena_bytes)
        self.words = np.frombuffer(self._map, np.uint64, attached.data_offset // 8)

    async def put(self, keys: Sequence[BlockKey], parent: BlockKey = ROOT) -> list[BlockKey]:
        """Writes what is not there yet; the keys that are visible now."""
        reserved = await self.client.reserve(keys, [parent, *keys[:-1]], 60.0, [parent == ROOT] + [False] * (len(keys) - 1))
        blocks = []
        for key, slot in zip(keys, reserved.slots, strict=True):
            if slot.outcome is ReserveOutcome.RESERVED:
                data = content(key, self.layout.block_bytes)
                start = self.attached.data_offset + slot.offset
                self._map[start : start + len(data)] = data
                blocks.append((key, range(self.layout.num_parts), part_checksums(data, self.layout.num_parts)))
        outcomes = await self.client.commit(reserved.lease_id, blocks) if blocks else []
        if CommitOutcome.PARTIAL in outcomes:
            await self.client.release([reserved.lease_id])
        stored = {key for (key, _, _), outcome in zip(blocks, outcomes, strict=True) if outcome is CommitOutcome.COMMITTED}
        there = {key for key, slot in zip(keys, reserved.slots, strict=True) if slot.outcome is ReserveOutcome.STORED}
        return [key for key in keys if key in stored | there]

    def read(self, slot: Slot) -> bytes | None:
        """A slot's bytes as a rank takes them: None when it was taken away meanwhile, or the checksums do not fit."""
        before = int(self.words[slot.offset >> 12])
        start = self.attached.data_offset + slot.offset
        data = self._map[start : start + self.layout.block_bytes]
        after = int(self.words[slot.offset >> 12])
        intact = part_checksums(data, self.layout.num_parts) == slot.checksums
        return data if before == slot.generation == after and intact else None

    async def get(self, keys: Sequence[BlockKey], max_wait_s: float = 3.0) -> Acquired:
        """Acquires, checks every byte, and releases."""
        acquired = await self.client.acquire(keys, 30.0, max_wait_s)
        for key, slot in zip(keys, acquired.slots, strict=False):
            assert self.read(slot) == content(key, self.layout.block_bytes), f"wrong bytes for {key.hex()}"
        if acquired.lease_id:
            await self.client.release([acquired.lease_id])
        return acquired

    def close(self) -> None:
        del self.words
        self._map.close()
