"""A real store with a disk below its arena: blocks go down by themselves, come back when asked for, and outlive the store."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cache_store.client import StoreClient
from cache_store.process import StoreProcess, StoreState
from tests.cache_store.arena_user import ArenaUser, content
from tests.cache_store.conftest import LAYOUT, SLOT_BYTES, Child, chain, connect, eventually, eventually_async

Start = Callable[..., StoreProcess]


@asynccontextmanager
async def user_of(process: StoreProcess, holder: Child) -> AsyncIterator[ArenaUser]:
    async with connect(process) as client:
        user = ArenaUser(client, await client.attach(LAYOUT, [holder.identity], "engine"), LAYOUT)
        try:
            yield user
        finally:
            user.close()


async def on_disk(client: StoreClient, num_blocks: int) -> None:
    async def there() -> bool:
        return (await client.stat()).disk_blocks >= num_blocks

    await eventually_async(there, 10.0, f"{num_blocks} blocks on disk")


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, object]:
    return {"disk_bytes": 256 * SLOT_BYTES, "disk_directory": str(tmp_path / "disk")}


async def test_a_killed_store_finds_its_blocks_again(
    store_process: Start, idle_child: Callable[[], Child], disk: dict[str, object]
) -> None:
    process = store_process(num_slots=64, **disk)
    holder, keys = idle_child(), chain("a", 40)
    async with user_of(process, holder) as user:
        assert await user.put(keys) == keys
        await on_disk(user.client, 40)
        first_pid = process.pid
        os.kill(first_pid, signal.SIGKILL)
        eventually(lambda: process.state is StoreState.READY and process.pid != first_pid, 20.0, "a new store")
    async with user_of(process, holder) as user:
        found = await user.client.lookup([*keys, *chain("b", 1)])
        assert (found.num_blocks, found.tier_runs) == (40, [("disk", 40)])
        assert (await user.client.acquire(keys, 30.0)).lease_id == 0  # nothing is in the arena, and nobody waits
        acquired = await user.get(keys)
        assert (len(acquired.slots), acquired.tier_runs, acquired.shortfall) == (40, [("disk", 40)], None)
        assert (await user.client.lookup(keys)).tier_runs == [("dram", 40)]
        assert (await user.get(keys)).tier_runs == [("dram", 40)]
        assert await user.client.check() == []


async def test_what_the_arena_evicts_comes_back(store_process: Start, idle_child: Callable[[], Child], disk: dict[str, object]) -> None:
    process = store_process(num_slots=32, **disk)
    async with user_of(process, idle_child()) as user:
        chains = [chain(name, 16) for name in range(8)]
        for number, keys in enumerate(chains):
            assert await user.put(keys) == keys
            await on_disk(user.client, 16 * (number + 1))
        for keys in chains:
            acquired = await user.get(keys)
            assert len(acquired.slots) == 16
        runs = [await user.client.lookup(keys) for keys in chains]
        assert all(found.num_blocks == 16 for found in runs)
        assert {tier for found in runs for tier, _ in found.tier_runs} == {"dram", "disk"}
        stat = await user.client.stat()
        assert (stat.held_slots, stat.pinned_blocks, stat.disk_blocks) == (0, 0, 128)
        assert await user.client.check() == []


async def test_many_ask_for_the_same_at_once(store_process: Start, idle_child: Callable[[], Child], disk: dict[str, object]) -> None:
    process = store_process(num_slots=32, **disk)
    async with user_of(process, idle_child()) as user:
        keys, other = chain("a", 24), chain("b", 30)
        await user.put(keys)
        await on_disk(user.client, 24)
        await user.put(other)
        await on_disk(user.client, 54)
        got = await asyncio.gather(*(user.get(keys[: 4 + 2 * number]) for number in range(10)))
        assert [len(acquired.slots) for acquired in got] == [4 + 2 * number for number in range(10)]

        async def quiet() -> bool:
            stat = await user.client.stat()
            return (stat.held_slots, stat.pinned_blocks, stat.leases) == (0, 0, 0)

        await eventually_async(quiet, 5.0, "the end of every pin")
        assert await user.client.check() == []


async def test_a_chain_longer_than_the_arena_comes_as_far_as_there_is_room(
    store_process: Start, idle_child: Callable[[], Child], disk: dict[str, object]
) -> None:
    process = store_process(num_slots=16, **disk)
    async with user_of(process, idle_child()) as user:
        small, long = chain("s", 16), chain("l", 12)
        await user.put(long)
        await on_disk(user.client, 12)
        await user.put(small)
        held = await user.client.acquire(chain("s", 10), 30.0)
        await on_disk(user.client, 28)
        acquired = await user.get(long)
        assert 0 < len(acquired.slots) <= 6
        assert acquired.shortfall == "no_space"
        await user.client.release([held.lease_id])
        assert len((await user.get(long)).slots) == 12
        assert await user.client.check() == []


async def test_a_damaged_block_is_a_miss_and_what_is_before_it_a_hit(
    store_process: Start, idle_child: Callable[[], Child], disk: dict[str, object], tmp_path: Path
) -> None:
    process = store_process(num_slots=16, **disk)
    async with user_of(process, idle_child()) as user:
        keys = chain("a", 10)
        await user.put(keys)
        await on_disk(user.client, 10)
        await user.put(chain("b", 16))
        await on_disk(user.client, 26)
        damage(tmp_path / "disk" / "blocks.data", content(keys[4], SLOT_BYTES))
        acquired = await user.get(keys)
        assert (len(acquired.slots), acquired.shortfall) == (4, "lost")
        assert (await user.client.lookup(keys)).num_blocks == 4
        assert await user.put(keys) == keys  # computed anew
        assert len((await user.get(keys)).slots) == 10
        assert await user.client.check() == []


async def test_what_is_warm_in_the_arena_stays_on_disk(store_process: Start, idle_child: Callable[[], Child], tmp_path: Path) -> None:
    """Others pass through a disk that is hardly larger than the arena; the prefix that is used outlives the store all the same."""
    disk = {"disk_bytes": 40 * SLOT_BYTES, "disk_directory": str(tmp_path / "disk")}
    process = store_process(num_slots=32, extent_bytes=8 * SLOT_BYTES, **disk)
    warm, holder = chain("warm", 6), idle_child()
    async with user_of(process, holder) as user:
        assert await user.put(warm) == warm
        for number in range(12):
            await user.put(chain(number, 8))
            await spilled(user.client)
            assert (await user.get(warm)).tier_runs == [("dram", 6)]
        os.kill(pid := process.pid, signal.SIGKILL)
        eventually(lambda: process.state is StoreState.READY and process.pid != pid, 20.0, "a new store")
    async with user_of(process, holder) as user:
        await on_disk(user.client, 30)
        assert (await user.get(warm)).tier_runs == [("disk", 6)]
        assert await user.client.check() == []


async def spilled(client: StoreClient) -> None:
    async def nothing_queued() -> bool:
        lines = (await client.metrics()).splitlines()
        return "mobula_store_queued_spills 0.0" in lines and "mobula_store_pinned_blocks 0.0" in lines

    await eventually_async(nothing_queued, 10.0, "an empty queue of spills")


def damage(path: Path, wanted: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(file.read().index(wanted) + 100)
        file.write(b"??")
