"""The store over its socket: a real child process, real messages."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import urllib.request
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cache_store.client import ClaimOutcome, CommitOutcome, MissReason, ReserveOutcome, StoreClient
from cache_store.errors import ArenaTooSmall, LayoutMismatch, StoreRefused, StoreUnavailable
from cache_store.process import StoreProcess
from cache_store.processes import ProcessIdentity, process_identity
from cache_store.wire import SECRET_HEADER
from protos import cache_store_pb2 as pb
from protos import cache_store_pb2_grpc
from tests.cache_store.conftest import LAYOUT, ROOT, SECRET, SLOT_BYTES, Child, chain, config_in, connect, eventually_async, key, parents_of


def sums(*numbers: int) -> bytes:
    return array("Q", numbers).tobytes()


async def put(client: StoreClient, keys: list, parents: list | None = None) -> list[CommitOutcome]:
    reserved = await client.reserve(keys, parents or parents_of(keys), 60.0)
    written = [each for each, slot in zip(keys, reserved.slots, strict=True) if slot.outcome is ReserveOutcome.RESERVED]
    return await client.commit(reserved.lease_id, [(each, [0, 1], sums(7, 1 << 63)) for each in written])


@pytest.fixture
async def client(store_process: Callable[..., StoreProcess], idle_child: Callable[[], Child]) -> AsyncIterator[StoreClient]:
    async with connect(store_process(num_slots=64)) as client:
        yield client


async def test_a_block_from_reserve_to_acquire(client: StoreClient, idle_child: Callable[[], Child]) -> None:
    writer = idle_child()
    attached = await client.attach(LAYOUT, [writer.identity], "engine")
    assert attached.slot_bytes == SLOT_BYTES
    assert os.stat(attached.arena_path).st_size == attached.arena_bytes
    keys = chain("a", 3)
    assert (await client.lookup(keys)) == (0, [], 0, MissReason.COLD, None, [])
    assert (await client.acquire(keys, 1.0)) == (0, [], [], None)
    reserved = await client.reserve(keys, parents_of(keys), 60.0, [True, False, False])
    assert [slot.outcome for slot in reserved.slots] == [ReserveOutcome.RESERVED] * 3
    blocks = [(each, [1, 0], sums(depth, 100 + depth)) for depth, each in enumerate(keys)]
    partial = [(keys[2], [1], sums(9))]
    assert await client.commit(reserved.lease_id, partial) == [CommitOutcome.PARTIAL]
    assert await client.commit(reserved.lease_id, blocks) == [CommitOutcome.COMMITTED] * 3
    assert await client.commit(reserved.lease_id, blocks) == [CommitOutcome.STALE] * 3
    found = await client.lookup([*keys, key("none")])
    assert (found.num_blocks, found.tier_runs) == (3, [("dram", 3)])
    acquired = await client.acquire(keys, 60.0)
    assert [slot.checksums for slot in acquired.slots] == [sums(100 + depth, depth) for depth in range(3)]
    assert [(slot.offset, slot.generation) for slot in acquired.slots] == [(slot.offset, slot.generation) for slot in reserved.slots]
    assert acquired.tier_runs == [("dram", 3)]
    assert await client.release([acquired.lease_id, reserved.lease_id]) == 1
    stat = await client.stat()
    assert (stat.blocks, stat.held_slots, stat.pinned_blocks, stat.sessions, stat.epoch) == (3, 0, 0, 1, attached.epoch)
    assert await client.check() == []
    await client.detach()
    with pytest.raises(StoreUnavailable, match="not attached"):
        await client.lookup(keys)
    await client.detach()


async def test_a_lookup_acquires_the_leading_blocks(client: StoreClient, idle_child: Callable[[], Child]) -> None:
    await client.attach(LAYOUT, [idle_child().identity], "engine")
    keys = chain("a", 3)
    assert (await client.lookup(keys, max_pinned=2, ttl_s=60.0)).pinned is None
    await put(client, keys)
    found = await client.lookup([*keys, key("none")], max_pinned=2, ttl_s=60.0)
    assert (found.num_blocks, found.miss_reason) == (3, MissReason.COLD)
    assert found.pinned is not None
    acquired = await client.acquire(keys, 60.0)
    assert found.pinned.slots == acquired.slots[:2]
    assert found.pinned.tier_runs == [("dram", 2)]
    assert await client.release([acquired.lease_id]) == 1
    assert (await client.stat()).pinned_blocks == 2
    assert await client.release([found.pinned.lease_id]) == 1
    found = await client.lookup(keys, 1e12, 1.0, max_pinned=2, ttl_s=60.0)
    assert (found.num_cheaper_to_compute, found.pinned) == (3, None)
    found = await client.lookup(keys, max_pinned=9, ttl_s=0.01)
    assert found.pinned is not None
    assert len(found.pinned.slots) == 3
    await asyncio.sleep(0.1)
    assert (await client.stat()).pinned_blocks == 0
    assert await client.check() == []


async def test_a_lookup_claims_what_is_not_there(client: StoreClient, idle_child: Callable[[], Child]) -> None:
    await client.attach(LAYOUT, [idle_child().identity], "engine")
    keys = chain("a", 4)
    assert (await client.lookup(keys, claim_ttl_s=60.0, min_claimed=9)).claims == [ClaimOutcome.GRANTED] * 4, "nothing of it is there"
    await put(client, keys[:2])
    for min_claimed, expected in ((3, 0), (2, 2)):
        found = await client.lookup(keys, claim_ttl_s=60.0, min_claimed=min_claimed)
        assert (found.num_blocks, len(found.claims)) == (2, expected)
    found = await client.lookup(keys[:2], 1e12, 1.0, claim_ttl_s=60.0)
    assert (found.num_cheaper_to_compute, found.claims) == (2, [])


async def test_claims_and_outcomes_over_the_wire(client: StoreClient, idle_child: Callable[[], Child]) -> None:
    await client.attach(LAYOUT, [idle_child().identity], "one")
    async with StoreClient(client.address, SECRET) as other:
        await other.attach(LAYOUT, [idle_child().identity], "two")
        a, b, c = chain("a", 3)
        await put(client, [a])
        await client.reserve([b], [a], 60.0)
        assert await client.claim([c], 60.0) == [ClaimOutcome.GRANTED]
        assert await other.claim([a, b, c], 60.0) == [ClaimOutcome.STORED, ClaimOutcome.ELSEWHERE, ClaimOutcome.ELSEWHERE]
        reserved = await other.reserve([a, b, c, key("x")], [ROOT, a, b, key("nobody")], 60.0, [True, False, False, False])
        assert [slot.outcome for slot in reserved.slots] == [
            ReserveOutcome.STORED,
            ReserveOutcome.WRITTEN_ELSEWHERE,
            ReserveOutcome.NO_PARENT,
            ReserveOutcome.NO_PARENT,
        ]
        assert reserved.lease_id == 0
        many = chain("many", 70)
        outcomes = [slot.outcome for slot in (await other.reserve(many, parents_of(many), 60.0)).slots]
        assert outcomes == [ReserveOutcome.RESERVED] * 62 + [ReserveOutcome.NO_SPACE] + [ReserveOutcome.NO_PARENT] * 7
        assert await client.check() == []


async def test_watch_begins_with_a_snapshot_and_follows(client: StoreClient, idle_child: Callable[[], Child]) -> None:
    await client.attach(LAYOUT, [idle_child().identity], "engine")
    await put(client, chain("a", 2))
    watcher = client.watch()
    snapshot = await asyncio.wait_for(anext(watcher), 5.0)
    assert sorted(snapshot.added) == sorted(chain("a", 2))
    assert (snapshot.tier, snapshot.removed) == ("dram", [])
    await put(client, [key("b")], [ROOT])
    event = await asyncio.wait_for(anext(watcher), 5.0)
    assert (event.sequence, event.added, event.epoch) == (snapshot.sequence + 1, [key("b")], snapshot.epoch)
    await watcher.aclose()


async def test_a_slow_watcher_sees_a_gap(store_process: Callable[..., StoreProcess], idle_child: Callable[[], Child]) -> None:
    process = store_process(num_slots=64, watch_queue_events=4)
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    async with connect(process) as client, grpc.aio.insecure_channel(process.address, small_window) as channel:
        await client.attach(LAYOUT, [idle_child().identity], "engine")
        stub = cache_store_pb2_grpc.CacheStoreStub(channel)
        stream = aiter(stub.Watch(pb.WatchRequest(), metadata=((SECRET_HEADER, SECRET),), timeout=60.0))
        last = (await anext(stream)).sequence
        for number in range(200):  # unread: several times what window, socket and queue hold
            await put(client, [key(f"{number} {i}") for i in range(60)], [ROOT] * 60)
        gap = False
        while not gap:
            event = await anext(stream)
            gap = event.sequence > last + 1
            last = event.sequence
        assert await client.check() == []


@pytest.mark.parametrize("secret", ["", "wrong"])
async def test_a_wrong_secret_opens_nothing(client: StoreClient, secret: str) -> None:
    async with StoreClient(client.address, secret or "x") as stranger:
        with pytest.raises(StoreRefused, match="secret"):
            await stranger.stat()
        with pytest.raises(StoreRefused, match="secret"):
            await anext(stranger.watch())


async def test_what_attach_refuses(client: StoreClient, idle_child: Callable[[], Child]) -> None:
    writer = idle_child()
    with pytest.raises(ArenaTooSmall, match="--store-memory"):
        await client.attach(dataclasses.replace(LAYOUT, num_parts=1000), [writer.identity], "big")
    with pytest.raises(LayoutMismatch):
        await client.attach(dataclasses.replace(LAYOUT, num_parts=0), [writer.identity], "none")
    store = (await _pid_of(client)).pid
    for wrong in (ProcessIdentity(writer.identity.pid, writer.identity.start_ticks + 1), process_identity(1), process_identity(store)):
        with pytest.raises(StoreRefused, match="process"):
            await client.attach(LAYOUT, [writer.identity, wrong], "wrong process")
    writer.close()
    with pytest.raises(StoreRefused, match="process"):
        await client.attach(LAYOUT, [(writer.process.pid, 1)], "dead process")
    assert (await client.stat()).sessions == 0


async def _pid_of(client: StoreClient) -> ProcessIdentity:
    """The store's process: the one that has the socket's directory's arena open."""
    directory = str(Path(client.address.removeprefix("unix:")).parent)
    for entry in Path("/proc").iterdir():  # noqa: ASYNC240
        if entry.name.isdigit():
            try:
                links = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
            except OSError:
                continue
            if any(link.startswith(directory) and link.endswith(".arena") for link in links):
                return process_identity(int(entry.name))
    raise AssertionError("no process has the arena open")


async def test_a_request_that_makes_no_sense_is_a_value_error(client: StoreClient, idle_child: Callable[[], Child]) -> None:
    await client.attach(LAYOUT, [idle_child().identity], "engine")
    with pytest.raises(ValueError, match="parents"):
        await client.reserve([key("a")], [], 1.0)
    with pytest.raises(ValueError, match="multiple"):
        await client.lookup([b"short"])
    reserved = await client.reserve([key("a")], [ROOT], 60.0)
    with pytest.raises(ValueError, match="parts"):
        await client.commit(reserved.lease_id, [(key("a"), [0, 5], sums(1, 2))])


async def test_nobody_there_is_unavailable_soon(shm: Path) -> None:
    async with StoreClient(f"unix:{shm}/nobody.sock", SECRET, timeout_s=3.0) as client:
        with pytest.raises(StoreUnavailable):
            await client.stat()
        with pytest.raises(StoreUnavailable):
            await anext(client.watch())
    with pytest.raises(StoreUnavailable):
        await client.stat()


async def test_extents_open_in_the_background(store_process: Callable[..., StoreProcess]) -> None:
    async with connect(store_process(num_slots=16 * 40)) as client:

        async def all_ready() -> bool:
            stat = await client.stat()
            return stat.ready_bytes == stat.total_bytes == 16 * 40 * SLOT_BYTES

        await eventually_async(all_ready, 10.0, "the last extent")


async def test_tcp_serves_too(store_process: Callable[..., StoreProcess]) -> None:
    process = store_process(address="127.0.0.1:0")
    host, _, port = process.address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    async with connect(process) as client:
        assert (await client.stat()).blocks == 0


async def test_two_stores_share_a_directory_but_not_an_address(store_process: Callable[..., StoreProcess], shm: Path) -> None:
    first, second = store_process(), store_process()
    assert first.address != second.address
    with pytest.raises(StoreRefused, match="already"):
        StoreProcess(dataclasses.replace(config_in(shm), address=first.address)).start(30.0)
    async with connect(first) as client:
        assert await client.check() == []


async def test_pins_over_the_wire(client: StoreClient, idle_child: Callable[[], Child]) -> None:
    await client.attach(LAYOUT, [idle_child().identity], "engine")
    keys, others = chain("a", 4), chain("b", 20)
    await put(client, keys)
    await put(client, others)
    pinned = await client.pin("tenant", [*keys, key("none")], 60.0)
    assert (pinned.num_blocks, pinned.num_bytes, pinned.over_quota) == (4, 4 * SLOT_BYTES, False)
    assert await client.pin("tenant", keys, 1e300) == pinned, "renewed"
    assert (await client.pin("tenant", others, 60.0))[1:] == (12, 12 * SLOT_BYTES, True)  # a quarter of 64 slots for one owner
    await put(client, [key("c")])
    assert await client.pin("tenant", [key("c")], 60.0) == (0, 0, 0, True)
    assert (await client.pin("other", [key("none")], 60.0)).pin_id == 0
    with pytest.raises(ValueError, match="owner"):
        await client.pin("", keys, 60.0)
    await client.detach()
    listed = await client.list_pins("tenant")
    assert [(pin.pin_id > 0, pin.owner, pin.num_blocks) for pin in listed] == [(True, "tenant", 4), (True, "tenant", 12)]
    assert all(0 < pin.remaining_s <= longest_s for pin, longest_s in zip(listed, (86400.0, 60.0), strict=True))
    assert await client.list_pins("other") == []
    assert await client.unpin("other", [pinned.pin_id]) == 0
    assert await client.unpin("tenant", [pinned.pin_id]) == 1
    assert [pin.num_blocks for pin in await client.list_pins()] == [12]
    assert (await client.stat()).kept_bytes == 12 * SLOT_BYTES
    assert await client.check() == []


async def test_metrics_over_the_wire_and_over_http(store_process: Callable[..., StoreProcess], idle_child: Callable[[], Child]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with connect(store_process(num_slots=16, metrics_address=f"127.0.0.1:{port}")) as client:
        await client.attach(LAYOUT, [idle_child().identity], "engine")
        for number in range(8):
            await put(client, chain(number, 4))
        await client.lookup([*chain(7, 4), key("none")])
        await client.lookup(chain(0, 4))
        acquired = await client.acquire(chain(7, 4), 60.0)
        text = await client.metrics()
        over_http = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5.0).read().decode())
        samples = {
            f"{s.name}{sorted(s.labels.values())}": s.value for family in text_string_to_metric_families(text) for s in family.samples
        }
        assert samples["mobula_store_hit_blocks_total['dram']"] == 4
        assert samples["mobula_store_missed_blocks_total['cold']"] == 1
        assert samples["mobula_store_missed_blocks_total['evicted']"] == 4
        assert samples["mobula_store_evicted_blocks_total['dram']"] == samples["mobula_store_age_at_eviction_seconds_count[]"] == 16
        assert samples["mobula_store_leases[]"] == 1
        assert samples["mobula_store_used_bytes['dram']"] == 16 * SLOT_BYTES
        assert set(text.splitlines()) - set(over_http.splitlines()) == set()
        await client.release([acquired.lease_id])
