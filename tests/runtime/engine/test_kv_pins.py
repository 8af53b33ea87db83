"""Wishes for pins, phase by phase, with the store's answers given by hand; and one that a real store keeps through a flood of others."""

from __future__ import annotations

import asyncio
import itertools
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_parts import BLOCK_SIZE, Bench, ScriptedPort, make_request
from realtime import RealStoreGroup, Running, wait_until
from simulated_group import make_info

from cache_store.client import CommitOutcome, Found, PinEntry, PinReply, Reserved, ReservedSlot, ReserveOutcome, StoreClient
from cache_store.config import StoreConfig
from cache_store.keys import BlockKey, chain_keys, salted_root
from cache_store.process import StoreProcess
from cache_store.processes import process_identity
from runtime.engine.kv_offers import KvOffers
from runtime.engine.kv_pins import KvPins
from runtime.engine.live import LiveRequest
from runtime.engine.store_port import Commit, Lookup, Pin, Release, RemoteStore, Reserve, StoreAnswer, StoreState
from runtime.request import PinOutcome, pin_owner
from workers.step import CopyResult

PROMPT = list(range(10))  # two full blocks and two tokens
SECRET = "between us"


class PinBench(Bench):
    def __init__(self, **config: object) -> None:
        super().__init__(num_pages=40, **{"max_num_batched_tokens": 8, **config})  # type: ignore[arg-type]
        self.port = ScriptedPort()
        self.offers = KvOffers(self.config, self.blocks, self.port, itertools.count(1), 1)
        self.blocks.on_publish, self.blocks.on_evict = self.offers.published, self.offers.evicted
        self.pins = KvPins(self.config, self.blocks, self.port, self.offers)
        self.now_s = 10.0

    def wish(self, name: str = "a", prompt: list[int] = PROMPT, **fields: object) -> LiveRequest:
        live = self.live(make_request(name, prompt, **{"max_tokens": 8, "pin_ttl_s": 60.0, **fields}))  # type: ignore[arg-type]
        self.pins.arrived(live)
        self.scheduler.add(live)
        return live

    def go(self, after_s: float = 0.0) -> None:
        self.now_s += after_s
        self.pins.advance(self.now_s)
        self.offers.advance(self.now_s)

    def answer(self, kind: type, reply: object) -> object:
        ticket, question = self.port.take(kind)
        answer = StoreAnswer(ticket, reply)  # type: ignore[arg-type]
        assert self.offers.answered(answer, self.now_s) or self.pins.answered(answer, self.now_s)
        return question

    def store_all(self) -> None:
        """The next batch of offers arrives in the store."""
        ticket, question = self.port.take(Reserve)
        assert isinstance(question, Reserve)
        slots = [ReservedSlot(ReserveOutcome.RESERVED, 256 * i, 1) for i in range(len(question.keys))]
        self.offers.answered(StoreAnswer(ticket, Reserved(1, slots)), self.now_s)
        for copy in self.offers.take_copies():
            self.offers.copied(CopyResult(copy.copy_id, True, b"sum"))
        self.answer(Commit, [CommitOutcome.COMMITTED] * len(slots))
        self.answer(Release, 1)

    def compute(self, live: LiveRequest) -> list[BlockKey]:
        """Steps until the whole prompt is computed. The keys of its full blocks."""
        while live.num_confirmed < live.num_prompt:
            self.step()
        return live.extend_keys(BLOCK_SIZE)[: live.num_prompt // BLOCK_SIZE]


def test_a_prompt_is_pinned_once_it_is_stored_while_the_request_goes_on() -> None:
    bench = PinBench(max_num_batched_tokens=4)
    live = bench.wish(tenant="blue")
    assert live.pin is PinOutcome.TAKEN
    bench.step()
    bench.go()
    assert bench.pins.next_deadline_s == math.inf, "the prompt is not computed yet"
    keys = bench.compute(live)
    bench.go()
    bench.go(1.0)
    assert [type(question) for _, question in bench.port.asked] == [Reserve], "nothing is asked before the blocks are stored"
    assert bench.pins.next_deadline_s > bench.now_s
    bench.store_all()
    bench.go()
    bench.go(1.0)
    assert [type(question) for _, question in bench.port.asked] == [Reserve], "its second block is still on its way"
    bench.store_all()
    bench.go(1.0)
    assert bench.answer(Lookup, Found(1, [("dram", 1)], 1)) == Lookup(keys)  # one of them is cheaper to compute: it is there
    assert bench.answer(Pin, PinReply(7, 2, 512, False)) == Pin("tenant:blue", keys, 60.0, bench.config.pin_wait_s)
    assert (bench.pins.num_wishes, bench.pins.num_kept, bench.pins.num_dropped) == (0, 1, 0)
    assert bench.port.asked == []
    assert live in bench.scheduler.running


def test_a_request_that_ends_early_is_pinned_as_far_as_it_is_known() -> None:
    bench = PinBench()
    live = bench.wish()
    bench.outputs.end(live, 1.0)
    bench.scheduler.remove(live)
    bench.go()
    bench.answer(Lookup, Found(1, [("disk", 1)]))
    assert isinstance(bench.answer(Pin, PinReply(7, 1, 256, False)), Pin)
    assert bench.pins.num_kept == 1


def test_what_the_store_has_lost_is_offered_once_more() -> None:
    bench = PinBench()
    keys = bench.compute(bench.wish(pin_ttl_s=0.0))
    bench.go()
    bench.store_all()
    live = bench.wish("b")  # its prefix is in pages, and the store has evicted it
    bench.compute(live)
    bench.go()
    bench.answer(Lookup, Found(1, [("dram", 1)]))
    bench.go(1.0)
    ticket, question = bench.port.asked[0]
    assert (question.keys, question.parents[1:], question.first) == (keys, keys[:1], [True, False])  # type: ignore[union-attr]
    assert ticket
    bench.store_all()
    bench.go(1.0)
    bench.answer(Lookup, Found(1, [("dram", 1)]))  # again it could not be stored: the rest is kept
    bench.answer(Pin, PinReply(7, 1, 256, True))
    assert (bench.pins.num_kept, bench.pins.num_wishes) == (1, 0)


def test_a_store_without_the_blocks_is_asked_later_and_later_until_the_time_is_up() -> None:
    bench = PinBench()
    live = bench.wish()
    bench.outputs.end(live, 1.0)
    bench.scheduler.remove(live)
    began_s, waits = bench.now_s, []
    while bench.pins.num_wishes:
        bench.go()
        bench.answer(Lookup, Found(0, []))
        if bench.pins.num_wishes:
            waits.append(bench.pins.next_deadline_s - bench.now_s)
            bench.now_s = bench.pins.next_deadline_s
    assert bench.pins.num_dropped == 1
    assert bench.now_s - began_s == pytest.approx(bench.config.pin_timeout_s)
    assert waits[:3] == pytest.approx([0.02, 0.04, 0.08])
    assert max(waits) == pytest.approx(0.64)


def test_quotas_end_a_wish_and_a_lost_store_ends_all_but_those_still_computed() -> None:
    bench = PinBench()
    for name in "ab":
        live = bench.wish(name)
        bench.outputs.end(live, 1.0)
        bench.scheduler.remove(live)
    watched = bench.wish("c")
    bench.go()
    bench.answer(Lookup, Found(2, [("dram", 2)]))
    bench.port.asked.reverse()
    bench.answer(Pin, PinReply(0, 0, 0, True))
    assert (bench.pins.num_dropped, bench.pins.num_wishes) == (1, 2)
    bench.port.state = StoreState.LOST
    bench.pins.lost()
    bench.offers.lost()
    assert (bench.pins.num_dropped, bench.pins.num_wishes) == (2, 1)
    bench.compute(watched)
    bench.port.asked.clear()
    bench.go()
    assert bench.port.asked == []
    bench.port.state = StoreState.READY
    bench.offers.attached()
    bench.go(1.0)
    bench.store_all()
    bench.go(1.0)
    bench.answer(Lookup, Found(2, [("dram", 2)]))
    bench.answer(Pin, PinReply(1, 2, 512, False))
    assert (bench.pins.num_kept, bench.pins.num_wishes) == (1, 0)


def test_what_is_ignored_says_so() -> None:
    bench = PinBench(max_pin_wishes=1)
    assert bench.wish("none", pin_ttl_s=0.0).pin is None
    assert bench.wish("short", PROMPT[:3]).pin is PinOutcome.TOO_SHORT
    assert bench.wish("one").pin is PinOutcome.TAKEN
    assert bench.wish("two").pin is PinOutcome.TOO_MANY
    bench.port.state = StoreState.NONE
    live = bench.wish("three")
    assert live.pin is PinOutcome.NO_STORE
    bench.outputs.end(live, 1.0)
    (output,) = bench.outputs.take()[0]
    assert output.pin == "no_store"
    assert PinBench(prefix_caching=False).wish().pin is PinOutcome.NO_STORE
    assert bench.pins.num_wishes == 1


@pytest.fixture
def rank() -> Iterator[tuple[int, int]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process_identity(process.pid)
        process.kill()


def listed(store: StoreProcess, tenant: str = "") -> list[PinEntry]:
    async def ask() -> list[PinEntry]:
        async with StoreClient(store.address, SECRET) as client:
            assert await client.check() == []
            return await client.list_pins(pin_owner(tenant))

    return asyncio.run(ask())


def unpin(store: StoreProcess, pin_id: int) -> None:
    async def ask() -> int:
        async with StoreClient(store.address, SECRET) as client:
            return await client.unpin(pin_owner(""), [pin_id])

    assert asyncio.run(ask()) == 1


def test_a_pinned_prompt_outlives_a_flood_and_its_engine_until_it_expires(tmp_path: Path, rank: tuple[int, int]) -> None:
    """64 slots; every flood is of 90 blocks."""
    config = StoreConfig(memory_bytes=1 << 18, extent_bytes=1 << 18, secret=SECRET, directory=str(tmp_path))
    info = make_info(32, max_model_len=120)._replace(pids=[rank])
    group, names = RealStoreGroup(info), map(str, itertools.count())
    prompt = list(range(40))

    with StoreProcess(config) as store:
        store.start(30.0)

        def ask(running: Running, tokens: list[int], **fields: object) -> list[int]:
            """Where the prompt came from, by tier."""
            name = next(names)
            running.engine.submit(make_request(name, tokens, max_tokens=1, **fields))
            running.last(name)
            cached = running.outputs[0, name][0].cached
            assert cached is not None
            return cached

        def flood(running: Running, start: int) -> None:
            for number in range(start, start + 9):
                ask(running, [1000 * number + i for i in range(41)])
                wait_until(lambda: running.engine.stats().blocks_pending_offer == 0)

        def start(label: str) -> tuple[Running, RemoteStore]:
            again = RealStoreGroup(info)
            again.arenas = group.arenas
            remote = RemoteStore(store.address, SECRET, label, probe_every_s=0.1)
            running = Running(again, store=remote)
            wait_until(lambda: running.engine.stats().store_state == "ready")
            return running, remote

        running, remote = start("one")
        ask(running, [*prompt, 1], pin_ttl_s=1e300)  # the store shortens it
        wait_until(lambda: running.engine.pins.num_kept == 1)
        (pin,) = listed(store)
        assert (pin.owner, pin.num_blocks) == ("tenant:", 10)
        assert 86000.0 < pin.remaining_s <= 86400.0
        assert listed(store, "blue") == []
        running.close()
        remote.close()

        running, remote = start("two")
        flood(running, 1)
        assert ask(running, [*prompt, 2]) == [0, 40, 0, 0]
        unpin(store, pin.pin_id)
        ask(running, [*prompt, 2], pin_ttl_s=0.2)
        wait_until(lambda: running.engine.pins.num_kept == 1)
        wait_until(lambda: not listed(store))
        flood(running, 10)
        root = running.engine.hello().root
        assert root is not None
        keys = chain_keys(salted_root(BlockKey(root), "", ""), prompt, BLOCK_SIZE)
        assert not any(map(running.engine.blocks.page_of, keys))
        assert sum(ask(running, [*prompt, 3])) < 40
        running.close()
        remote.close()
