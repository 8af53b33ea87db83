"""One store between engines of different tensor-parallel sizes: what one wrote all others read, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import xxhash
from checkpoints import random_tokens

from cache_store.client import Attached, Slot, StoreClient
from cache_store.keys import BlockKey, Layout, chain_keys, salted_root
from cache_store.outcomes import StoreStat
from cache_store.process import StoreProcess
from cache_store.processes import process_identity
from tests.integration.replicas import SECRET, Replica, watch_plans, worker_config
from workers.local import RankPool
from workers.step import ArenaSpec, BlockCopy, CopyResult, StepPlan

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BLOCK_SIZE, NUM_BLOCKS = 16, 5
PROMPT = random_tokens(NUM_BLOCKS * BLOCK_SIZE + 3, seed=6)
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, LATENT_DIM = 2, 4, 16, 32 + 8  # of the checkpoints
BLOCK_BYTES = {
    "llama": NUM_KV_HEADS * NUM_LAYERS * 2 * BLOCK_SIZE * HEAD_DIM * 4,
    "deepseek": NUM_LAYERS * BLOCK_SIZE * LATENT_DIM * 4,  # the latent once, whatever the number of ranks
}


class Stored(NamedTuple):
    """Blocks of a store, and what its arena holds for them."""

    slots: list[Slot]
    contents: list[bytes]
    stat: StoreStat


def keys_of(replica: Replica, prompt: Sequence[int]) -> list[BlockKey]:
    root = replica.engine.hello().root
    assert root is not None
    return chain_keys(salted_root(BlockKey(root), "", ""), prompt, BLOCK_SIZE)


def read_store(store: StoreProcess, layout: Layout, keys: list[BlockKey]) -> Stored:
    async def read() -> Stored:
        async with StoreClient(store.address, SECRET) as client:
            attached = await client.attach(layout, [process_identity(os.getpid())], "reader")  # reads only, so it is never killed
            acquired = await client.acquire(keys, 60.0)
            contents = [_slot_bytes(attached, slot, layout.block_bytes) for slot in acquired.slots]
            await client.detach()
            assert await client.check() == []
            return Stored(acquired.slots, contents, await client.stat())

    return asyncio.run(read())


def _slot_bytes(attached: Attached, slot: Slot, num_bytes: int) -> bytes:
    with open(attached.arena_path, "rb") as file:
        return os.pread(file.fileno(), num_bytes, attached.data_offset + slot.offset)


@contextlib.contextmanager
def scratch_arena(slot_bytes: int, num_slots: int) -> Iterator[ArenaSpec]:
    """An arena of nobody's store, for a look at pages. All generation words are 1."""
    path = Path(f"/dev/shm/integration-scratch-{os.getpid()}")
    data_offset = 4096
    total_bytes = data_offset + num_slots * slot_bytes
    try:
        path.write_bytes(bytes(total_bytes))
        np.memmap(path, np.uint64, "r+", shape=(data_offset // 8,))[:] = 1
        yield ArenaSpec(str(path), total_bytes, data_offset, slot_bytes)
    finally:
        path.unlink(missing_ok=True)


def page_checksums(replica: Replica, keys: list[BlockKey]) -> list[bytes]:
    """Of all parts of the blocks, as the pages of the ranks hold them. The replica is stopped for it."""
    replica.stop()
    pages = [replica.engine.blocks.page_of(key) for key in keys]
    assert None not in pages
    slot_bytes = -(-replica.info.layout.block_bytes // 4096) * 4096
    deadline_s = time.monotonic() + 30.0
    with scratch_arena(slot_bytes, len(pages)) as arena:
        replica.group.attach_arena(arena)
        saves = [BlockCopy(index, page, index * slot_bytes, 1, deadline_s, b"") for index, page in enumerate(pages)]  # type: ignore[arg-type]
        replica.group.submit(StepPlan(replica.engine.scheduler.sequence + 1, [], [], [], [], saves))
        results: list[CopyResult] = []
        while len(results) < len(pages):
            assert time.monotonic() < deadline_s
            results += [answer for answer in replica.group.poll(0.1) if isinstance(answer, CopyResult)]
    assert all(result.ok for result in results)
    return [result.checksums for result in sorted(results)]


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_what_tp_2_wrote_is_read_by_tp_1_and_tp_4(
    checkpoints: Any, pool: RankPool, start_store: Callable[..., StoreProcess], name: str
) -> None:
    store = start_store()
    folder = checkpoints.folder(name)
    with Replica(pool, worker_config(folder, 2), store.address) as writer:
        tokens = writer.ask(PROMPT, 4).token_ids
        writer.await_offers()
        layout, keys = writer.info.layout, keys_of(writer, PROMPT)
        assert len(keys) == NUM_BLOCKS
        assert layout.block_bytes == BLOCK_BYTES[name]
        written = read_store(store, layout, keys)
        assert page_checksums(writer, keys) == [slot.checksums for slot in written.slots]
    assert written.stat.blocks == written.stat.committed_blocks == NUM_BLOCKS
    assert written.stat.used_bytes == NUM_BLOCKS * BLOCK_BYTES[name]
    for slot, content in zip(written.slots, written.contents, strict=True):
        parts = [content[start : start + layout.part_bytes] for start in range(0, layout.block_bytes, layout.part_bytes)]
        assert slot.checksums == struct.pack(f"<{layout.num_parts}Q", *(xxhash.xxh3_64_intdigest(part) for part in parts))
    assert len(set(written.contents)) == NUM_BLOCKS

    for tp, copy_rate in ((1, 0.0), (4, 0.0), (1, 1e12), (2, 1e12)):
        with Replica(pool, worker_config(folder, tp), store.address) as reader:
            assert reader.info.layout == layout
            assert keys_of(reader, PROMPT) == keys
            reader.engine._rates.copy_bytes_per_s = copy_rate
            plans = watch_plans(reader)
            answer = reader.ask(PROMPT, 4)
            assert [plan.waits for plan in plans if plan.rows_in] == [copy_rate > 0], "its step goes ahead of copies that are quick"
            assert answer.cached.dram == answer.cached.total == NUM_BLOCKS * BLOCK_SIZE
            assert answer.token_ids == tokens
            reader.await_offers()
            assert page_checksums(reader, keys) == [slot.checksums for slot in written.slots]
    after = read_store(store, layout, keys)
    assert after.contents == written.contents
    assert (after.stat.blocks, after.stat.committed_blocks) == (NUM_BLOCKS, NUM_BLOCKS), "nothing was written a second time"
