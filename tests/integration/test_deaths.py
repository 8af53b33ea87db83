"""Engines, ranks and stores that die or stop at the worst moment: no slot stays held, no wrong byte is read, no request notices a store."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from checkpoints import random_tokens

from cache_store.client import ReserveOutcome, StoreClient
from cache_store.keys import BlockKey, Layout, hash_fields
from cache_store.outcomes import StoreStat
from cache_store.process import StoreProcess
from cache_store.processes import process_identity
from tests.integration.replicas import ROOT, SECRET, Replica, await_true, worker_config
from tests.integration.stopping_runner import trigger
from workers.local import RankPool
from workers.worker import RankParts

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BLOCK_SIZE, NUM_BLOCKS, NUM_OUTPUTS = 16, 5, 8
PROMPT = random_tokens(NUM_BLOCKS * BLOCK_SIZE + 3, seed=3)
STOPPING = RankParts(runner="tests.integration.stopping_runner:StoppingRunner")


@pytest.fixture
def model(checkpoints: Any, tmp_path: Path) -> Path:
    """A folder of the test's own, for its triggers."""
    folder = tmp_path / "llama"
    folder.mkdir()
    for path in checkpoints.folder("llama").iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoints: Any) -> list[int]:
    tokens: list[int] = checkpoints.greedy("llama", PROMPT, NUM_OUTPUTS, min_gap=1e-3)
    return tokens


def stat_of(store: StoreProcess) -> StoreStat:
    """Also asks the store to check itself. Neither call changes anything."""

    async def ask() -> StoreStat:
        async with StoreClient(store.address, SECRET) as client:
            assert await client.check() == []
            return await client.stat()

    return asyncio.run(ask())


def await_stat(store: StoreProcess, condition: Callable[[StoreStat], bool]) -> StoreStat:
    await_true(lambda: condition(stat_of(store)), lambda: str(stat_of(store)), 30.0)
    return stat_of(store)


def state_of(pid: int) -> str:
    """As in /proc: R, S, T (stopped), Z (dead and not reaped); empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


class Filler:
    """Another client of the store, which takes every slot and fills it with bytes of its own."""

    def __init__(self, store: StoreProcess, layout: Layout, pid: int) -> None:
        self.content: dict[int, bytes] = {}  # by offset of the slot
        asyncio.run(self._fill(store, layout, pid))

    async def _fill(self, store: StoreProcess, layout: Layout, pid: int) -> None:
        async with StoreClient(store.address, SECRET) as client:
            attached = await client.attach(layout, [process_identity(pid)], "filler")
            keys = [BlockKey(hash_fields("filler", str(index).encode())) for index in range((await client.stat()).total_bytes // 4096)]
            reserved = await client.reserve(keys, keys, 60.0, [True] * len(keys))
            with open(attached.arena_path, "r+b") as file:  # noqa: ASYNC230
                self._arena = mmap.mmap(file.fileno(), attached.arena_bytes)
            self._base = attached.data_offset
            blocks = []
            for key, slot in zip(keys, reserved.slots, strict=True):
                if slot.outcome is ReserveOutcome.RESERVED:
                    content = self.content[slot.offset] = bytes(key) * (layout.block_bytes // len(key))
                    self._arena[self._base + slot.offset : self._base + slot.offset + len(content)] = content
                    parts = [content[start : start + layout.part_bytes] for start in range(0, len(content), layout.part_bytes)]
                    checksums = struct.pack(f"<{len(parts)}Q", *map(xxhash.xxh3_64_intdigest, parts))
                    blocks.append((key, range(layout.num_parts), checksums))
            await client.commit(reserved.lease_id, blocks)
            await client.detach()

    def is_untouched(self) -> bool:
        start = self._base
        return all(self._arena[start + offset : start + offset + len(content)] == content for offset, content in self.content.items())


@pytest.fixture
def filler_pid() -> Iterator[int]:
    """A process that may be registered with a store."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


def test_a_rank_stopped_in_a_load_reads_nothing_of_the_slots_next_owner(
    pool: RankPool, start_store: Callable[..., StoreProcess], model: Path, expected: list[int], filler_pid: int
) -> None:
    store = start_store(memory_bytes=1 << 18, extent_bytes=1 << 18)
    worker = worker_config(model, 2)
    with Replica(pool, worker, store.address) as writer:
        assert writer.ask(PROMPT, NUM_OUTPUTS).token_ids == expected
        writer.await_offers()
        layout = writer.info.layout
    with Replica(pool, worker, store.address, parts=STOPPING, lease_ttl_s=1.5, copy_timeout_s=0.75) as reader:
        victim = reader.info.pids[1][0]
        trigger(model, "loads", 1).touch()
        request_id = reader.submit(PROMPT, NUM_OUTPUTS)
        try:
            await_true(lambda: state_of(victim) == "T", lambda: f"rank 1 is in state {state_of(victim)}")
            await_stat(store, lambda stat: stat.leases == stat.pinned_blocks == 0)  # by the deadline alone
            filler = Filler(store, layout, filler_pid)
            assert len(filler.content) == (1 << 18) // layout.block_bytes, "every slot has a new owner"
        finally:
            os.kill(victim, signal.SIGCONT)
        answer = reader.answer(request_id)
        assert answer.token_ids == expected
        assert answer.cached.total < NUM_BLOCKS * BLOCK_SIZE
        assert reader.engine.loads.jobs.num_failed > 0
        reader.await_offers()
        assert reader.ask(PROMPT, NUM_OUTPUTS).token_ids == expected
    await_stat(store, lambda stat: stat.held_slots == stat.leases == stat.quarantined_slots == 0)
    assert stat_of(store).killed_holders == 0


def test_a_rank_stopped_in_a_save_is_gone_before_the_slot_has_another_owner(
    pool: RankPool, start_store: Callable[..., StoreProcess], model: Path, expected: list[int], filler_pid: int
) -> None:
    store = start_store(memory_bytes=1 << 18, extent_bytes=1 << 18, kill_grace_s=0.2)
    replica = Replica(pool, worker_config(model, 2), store.address, parts=STOPPING, lease_ttl_s=1.5, copy_timeout_s=0.75)
    with replica:
        pids = [pid for pid, _ in replica.info.pids]
        layout = replica.info.layout
        trigger(model, "saves", 1).touch()
        request_id = replica.submit(PROMPT, 400)
        await_true(lambda: state_of(pids[1]) == "T", lambda: f"rank 1 is in state {state_of(pids[1])}")
        stopped = stat_of(store)
        assert stopped.held_slots + stopped.quarantined_slots > 0
        await_stat(store, lambda stat: stat.held_slots == stat.quarantined_slots == stat.leases == 0)
        assert stat_of(store).killed_holders == 2
        assert [state_of(pid) for pid in pids] == ["Z", "Z"]
        filler = Filler(store, layout, filler_pid)
        assert len(filler.content) == (1 << 18) // layout.block_bytes
        os.kill(pids[1], signal.SIGCONT)  # a zombie does not care
        last = replica.outputs(request_id)[-1]
        assert last.error is not None
        assert last.error[0] == "GroupFailed"
        assert filler.is_untouched()
    assert replica.failure is not None
    with Replica(pool, worker_config(model, 2), store.address) as other:
        answer = other.ask(PROMPT, NUM_OUTPUTS)
        assert (answer.token_ids, answer.cached.total) == (expected, 0)
        other.await_offers()


def test_an_engine_killed_between_reserve_and_commit_leaves_nothing(
    pool: RankPool, start_store: Callable[..., StoreProcess], model: Path, expected: list[int]
) -> None:
    store = start_store()
    arguments = ["-m", "tests.integration.dying_engine", store.address, str(model), *map(str, PROMPT)]
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True) as engine:
        try:
            assert engine.stdout
            rank_pids = [int(pid) for pid in engine.stdout.readline().split()]  # the process ends when it gets no further
            assert len(rank_pids) == 2
            held = stat_of(store)
            assert (held.held_slots, held.blocks, held.sessions) == (NUM_BLOCKS, 0, 1)
        finally:
            engine.kill()
    await_stat(store, lambda stat: stat.held_slots == stat.quarantined_slots == stat.sessions == stat.leases == 0)
    assert stat_of(store).killed_holders == 0, "the ranks end by themselves"
    assert {state_of(pid) for pid in rank_pids} <= {"", "Z"}
    with Replica(pool, worker_config(model, 2), store.address) as other:
        answer = other.ask(PROMPT, NUM_OUTPUTS)
        assert (answer.token_ids, answer.cached.total) == (expected, 0)
        other.await_offers()
    assert stat_of(store).blocks == NUM_BLOCKS


def test_a_store_killed_under_running_requests_is_missed_by_none(
    pool: RankPool, start_store: Callable[..., StoreProcess], model: Path
) -> None:
    store = start_store()
    worker = worker_config(model, 2)
    prompts = [[*PROMPT, *random_tokens(20, seed=index)] for index in range(8)]
    with Replica(pool, worker) as alone:
        quiet = [alone.answer(request_id).token_ids for request_id in [alone.submit(prompt, 48) for prompt in prompts]]
    with Replica(pool, worker, store.address) as replica:
        replica.ask(PROMPT, 1)
        request_ids = [replica.submit(prompt, 48) for prompt in prompts]
        replica.await_stats(lambda stats: stats.num_running > 0)
        before = store.pid
        os.kill(before, signal.SIGKILL)
        assert [replica.answer(request_id).token_ids for request_id in request_ids] == quiet
        await_true(lambda: store.pid != before and store.state == "ready", lambda: f"the store is {store.state}")
        # The new store is attached to and warms up from the pages; no request is needed for that.
        await_stat(store, lambda stat: stat.blocks >= NUM_BLOCKS + 8 * 3)
        replica.await_stats(lambda stats: stats.store_state == "ready")
        replica.await_offers()
    with Replica(pool, worker, store.address) as warm:
        answer = warm.ask(prompts[3], 48)
        assert answer.token_ids == quiet[3]
        assert answer.cached.dram == (len(prompts[3]) - 1) // BLOCK_SIZE * BLOCK_SIZE
