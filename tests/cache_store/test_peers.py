"""Two stores in two processes, and one store with peers that stall, die, lie or corrupt: always a miss, never a wrong byte."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from cache_store.client import StoreClient
from cache_store.process import StoreProcess, StoreState
from cache_store.wire import SECRET_HEADER
from protos import cache_store_pb2 as pb
from protos import cache_store_pb2_grpc
from tests.cache_store.arena_user import ArenaUser
from tests.cache_store.conftest import LAYOUT, SECRET, SLOT_BYTES, Child, chain, connect, eventually, eventually_async, key
from tests.cache_store.fake_peer import FakePeer

Start = Callable[..., StoreProcess]
Join = Callable[..., object]
LOOPBACK = "127.0.0.1:0"


@pytest.fixture
async def user_of(idle_child: Callable[[], Child]) -> AsyncIterator[Join]:
    async with AsyncExitStack() as stack:

        async def join(process: StoreProcess) -> ArenaUser:
            client = await stack.enter_async_context(connect(process))
            user = ArenaUser(client, await client.attach(LAYOUT, [idle_child().identity], "engine"), LAYOUT)
            stack.callback(user.close)
            return user

        yield join


async def knows(client: StoreClient, keys: list, runs: list[tuple[str, int]], timeout_s: float = 10.0) -> None:
    async def known() -> bool:
        return (await client.lookup(keys)).tier_runs == runs

    await eventually_async(known, timeout_s, f"a lookup that finds {runs}")


async def at_rest(client: StoreClient) -> None:
    async def rests() -> bool:
        stat = await client.stat()
        return (stat.held_slots, stat.pinned_blocks, stat.quarantined_slots) == (0, 0, 0)

    await eventually_async(rests, 15.0, "the return of every slot and pin")
    assert await client.check() == []


async def test_a_prefix_warm_on_one_node_is_used_by_another(store_process: Start, user_of: Join) -> None:
    first = store_process(num_slots=64, peer_address=LOOPBACK)
    second = store_process(num_slots=64, peer_address=LOOPBACK, peers=(first.peer_address,))
    one, two = await user_of(first), await user_of(second)
    keys = chain("a", 40)
    assert await one.put(keys[:30]) == keys[:30]
    await two.put(keys[:4])
    await knows(two.client, keys, [("dram", 4), ("peer", 26)])
    acquired = await two.get(keys)
    assert (len(acquired.slots), acquired.tier_runs, acquired.shortfall) == (30, [("dram", 4), ("peer", 26)], None)
    assert (await two.client.lookup(keys)).tier_runs == [("dram", 30)]
    await one.put(keys)
    await knows(two.client, keys, [("dram", 30), ("peer", 10)])  # and what comes later
    assert len((await two.get(keys)).slots) == 40
    assert (await two.client.stat()).num_peers == 1
    for user in (one, two):
        await at_rest(user.client)


async def test_a_peers_disk_lends_too_and_what_is_gone_is_forgotten(store_process: Start, user_of: Join, tmp_path: Path) -> None:
    disk = {"disk_bytes": 64 * SLOT_BYTES, "disk_directory": str(tmp_path / "disk")}
    first = store_process(num_slots=16, peer_address=LOOPBACK, **disk)
    second = store_process(num_slots=64, peers=(first.peer_address,))
    one, two = await user_of(first), await user_of(second)
    keys = chain("a", 12)
    await one.put(keys)

    async def spilled() -> bool:
        return (await one.client.stat()).disk_blocks == num_blocks

    num_blocks = 12
    await eventually_async(spilled, 10.0, "twelve blocks on disk")
    await one.put(chain("b", 16))
    num_blocks = 28
    await eventually_async(spilled, 10.0, "all blocks on disk")
    assert (await one.client.lookup(keys)).tier_runs[-1][0] == "disk"
    await knows(two.client, keys, [("peer", 12)])
    assert len((await two.get(keys)).slots) == 12
    await at_rest(two.client)


async def test_a_peer_that_is_killed_is_a_miss_and_comes_back(store_process: Start, user_of: Join) -> None:
    first = store_process(num_slots=64, peer_address=LOOPBACK)
    second = store_process(num_slots=64, peers=(first.peer_address,))
    one, two = await user_of(first), await user_of(second)
    keys = chain("a", 8)
    await one.put(keys)
    await knows(two.client, keys, [("peer", 8)])
    pid = first.pid
    os.kill(pid, signal.SIGKILL)
    acquired = await two.get(keys, max_wait_s=3.0)
    assert acquired.slots == []
    await knows(two.client, keys, [])
    await at_rest(two.client)
    eventually(lambda: first.state is StoreState.READY and first.pid != pid, 20.0, "a new store")
    again = await user_of(first)  # restarted at the same addresses
    await again.put(keys)
    await knows(two.client, keys, [("peer", 8)], timeout_s=30.0)
    assert len((await two.get(keys)).slots) == 8


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("behaviour", ["corrupt", "dies midway", "stalls", "has nothing", "lies about sizes", "refuses"])
async def test_a_bad_peer_is_a_miss_in_bounded_time(store_process: Start, user_of: Join, behaviour: str, plain: bool) -> None:
    store = store_process(num_slots=64, load_timeout_s=2.0)
    user = await user_of(store)
    keys = chain("a", 6)
    with FakePeer(keys, behaviour, plain=plain) as peer:
        await user.client.set_peers([peer.address])
        await knows(user.client, keys, [("peer", 6)])
        async with asyncio.timeout(4.0):
            acquired = await user.get(keys, max_wait_s=1.0)  # which compares every byte
        assert len(acquired.slots) == (2 if behaviour in ("corrupt", "dies midway", "stalls") else 0)
        assert acquired.shortfall in ("lost", "late")
        await at_rest(user.client)
        if behaviour in ("corrupt", "has nothing"):  # what it does not have is forgotten; the others are asked again after a rest
            assert (await user.client.lookup(keys)).num_blocks == len(acquired.slots)
        assert peer.num_opened == 1
    await user.client.set_peers([])
    assert await user.put(keys) == keys


async def test_a_good_fake_is_believed(store_process: Start, user_of: Join) -> None:
    """The fake speaks the protocol: what the bad ones show is not that nothing works."""
    user = await user_of(store_process(num_slots=64))
    for plain in (True, False):
        keys = chain(f"plain {plain}", 6)
        with FakePeer(keys, "good", plain=plain) as peer:
            await user.client.set_peers([peer.address])
            await knows(user.client, keys, [("peer", 6)])
            assert len((await user.get(keys)).slots) == 6


async def test_tickets_are_good_once_and_secrets_are_asked_for(store_process: Start, user_of: Join) -> None:
    store = store_process(num_slots=16, peer_address=LOOPBACK)
    user = await user_of(store)
    await user.put([key("a")])
    request = pb.OpenRequest(keys=key("a"), layout=LAYOUT.digest(), timeout_ms=5000)
    metadata = ((SECRET_HEADER, SECRET),)
    async with grpc.aio.insecure_channel(store.peer_address) as channel:
        stub = cache_store_pb2_grpc.PeerStoreStub(channel)
        for wrong in ((), ((SECRET_HEADER, "wrong"),)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Open(request, metadata=wrong, timeout=5.0)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await stub.Open(pb.OpenRequest(keys=key("b"), layout=LAYOUT.digest()), metadata=metadata, timeout=5.0)).num_blocks == 0
        assert (await stub.Open(pb.OpenRequest(keys=key("a"), layout=b"other"), metadata=metadata, timeout=5.0)).num_blocks == 0
        opened = await stub.Open(request, metadata=metadata, timeout=5.0)
        assert (opened.num_blocks, opened.block_bytes) == (1, SLOT_BYTES)
        fetch = channel.unary_stream("/mobula.cache_store.v1.PeerStore/Fetch")
        assert sum([len(chunk) async for chunk in fetch(opened.ticket, metadata=metadata, timeout=5.0)]) == SLOT_BYTES
        with pytest.raises(grpc.aio.AioRpcError) as used:
            await anext(aiter(fetch(opened.ticket, metadata=metadata, timeout=5.0)))
        assert used.value.code() is grpc.StatusCode.NOT_FOUND
        reader, writer = await asyncio.open_connection(store.peer_address.rpartition(":")[0], opened.port)
        writer.write(opened.ticket)
        assert await asyncio.wait_for(reader.read(), 5.0) == b""
        writer.close()
        expiring = await stub.Open(pb.OpenRequest(keys=key("a"), layout=LAYOUT.digest(), timeout_ms=50), metadata=metadata, timeout=5.0)
        assert expiring.num_blocks == 1
    await at_rest(user.client)  # also of what nobody fetched


async def test_what_is_cheaper_to_compute_is_not_brought(store_process: Start, user_of: Join) -> None:
    first = store_process(num_slots=64, peer_address=LOOPBACK)
    user, two = await user_of(first), await user_of(store_process(num_slots=64, peers=(first.peer_address,)))
    keys = chain("a", 8)
    await user.put(keys)
    await two.put(keys[:2])
    await knows(two.client, keys, [("dram", 2), ("peer", 6)])
    slow = await two.client.lookup(keys, 1_000.0)
    fast = await two.client.lookup(keys, 1e9)
    assert (slow.num_blocks, slow.num_cheaper_to_compute, slow.miss_reason) == (8, 0, None)
    assert (fast.num_blocks, fast.num_cheaper_to_compute, fast.miss_reason) == (0, 8, "cheaper_to_compute")
    medium = await two.client.lookup(keys, 100_000.0)  # 6 blocks: 1 ms to compute, 2 ms to ask a peer for
    assert (medium.num_blocks, medium.tier_runs, medium.num_cheaper_to_compute) == (2, [("dram", 2)], 6)
