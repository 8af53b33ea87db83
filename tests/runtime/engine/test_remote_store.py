"""The engine's port over a real store process: every question, loss and return; and an engine that lives through it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_parts import ROOT, make_request
from realtime import WAIT_S, RealStoreGroup, Running, expected, wait_until
from simulated_group import NUM_PARTS, make_info

from cache_store.client import CommitOutcome, ReserveOutcome
from cache_store.config import StoreConfig
from cache_store.keys import chain_keys
from cache_store.process import StoreProcess
from cache_store.processes import process_identity
from runtime.engine.store_port import (
    Acquire,
    Commit,
    Lookup,
    Question,
    Release,
    RemoteStore,
    Reserve,
    StoreAnswer,
    StoreEvent,
    StoreLost,
    StoreReady,
    StoreState,
)

SECRET = "between us"
LAYOUT = make_info(8).layout
KEYS = chain_keys(ROOT, list(range(12)), 4)


@pytest.fixture
def rank() -> Iterator[tuple[int, int]]:
    """A process that may be registered with a store, and killed by it."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process_identity(process.pid)
        process.kill()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    config = StoreConfig(memory_bytes=1 << 20, extent_bytes=1 << 20, secret=SECRET, directory=str(tmp_path))
    with StoreProcess(config) as process:
        process.start(30.0)
        yield process


class Port:
    """A RemoteStore with its waker, and what it has said so far."""

    def __init__(self, address: str, secret: str = SECRET) -> None:
        self.remote = RemoteStore(address, secret, "test", timeout_s=5.0, probe_every_s=0.1)
        self.woken = threading.Event()
        self.events: list[StoreEvent] = []

    def wait_for(self, kind: type) -> StoreEvent:
        deadline_s = time.monotonic() + WAIT_S
        while True:
            self.events += self.remote.poll()
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
            assert time.monotonic() < deadline_s, f"no {kind.__name__} among {self.events}"
            self.woken.wait(0.1)
            self.woken.clear()

    def ask(self, question: Question) -> object:
        ticket = self.remote.ask(question)
        self.remote.send()
        assert ticket is not None
        answer = self.wait_for(StoreAnswer)
        assert isinstance(answer, StoreAnswer)
        assert answer.ticket == ticket
        return answer.reply


@pytest.fixture
def port(store: StoreProcess, rank: tuple[int, int]) -> Iterator[Port]:
    port = Port(store.address)
    with port.remote:
        port.remote.start(LAYOUT, [rank], port.woken.set)
        yield port


def test_every_question_has_its_answer(port: Port) -> None:
    assert port.remote.state is StoreState.CONNECTING
    assert port.remote.ask(Lookup(KEYS)) is None
    ready = port.wait_for(StoreReady)
    assert isinstance(ready, StoreReady)
    assert port.remote.state is StoreState.READY
    assert ready.arena.slot_bytes >= LAYOUT.block_bytes
    assert Path(ready.arena.path).stat().st_size == ready.arena.total_bytes
    assert port.ask(Lookup(KEYS)).num_blocks == 0
    reserved = port.ask(Reserve(KEYS, [ROOT, *KEYS[:-1]], [True, False, False], 60.0))
    assert [slot.outcome for slot in reserved.slots] == [ReserveOutcome.RESERVED] * 3
    blocks = [(key, range(NUM_PARTS), bytes([i]) * 8 * NUM_PARTS) for i, key in enumerate(KEYS)]
    assert port.ask(Commit(reserved.lease_id, blocks)) == [CommitOutcome.COMMITTED] * 3
    found = port.ask(Lookup(KEYS, 2, 60.0))
    assert found.num_blocks == 3
    acquired = port.ask(Acquire(KEYS, 60.0))
    assert [slot.checksums for slot in acquired.slots] == [checksums for _, _, checksums in blocks]
    assert found.pinned.slots == acquired.slots[:2]
    assert port.ask(Release([acquired.lease_id, found.pinned.lease_id])) == 2


def test_a_restarted_store_is_noticed_and_attached_to_again(port: Port, store: StoreProcess) -> None:
    first = port.wait_for(StoreReady)
    assert isinstance(first, StoreReady)
    os.kill(store.pid, signal.SIGKILL)
    assert isinstance(port.wait_for(StoreLost), StoreLost)
    assert port.remote.state is StoreState.LOST
    assert port.remote.ask(Lookup(KEYS)) is None
    second = port.wait_for(StoreReady)
    assert isinstance(second, StoreReady)
    assert second.epoch != first.epoch
    assert port.ask(Lookup(KEYS)).num_blocks == 0


def test_open_questions_are_answered_before_the_loss(port: Port, store: StoreProcess) -> None:
    port.wait_for(StoreReady)
    os.kill(store.pid, signal.SIGSTOP)
    tickets = [port.remote.ask(Lookup(KEYS)) for _ in range(20)]
    port.remote.send()
    tickets += [port.remote.ask(Lookup(KEYS)) for _ in range(20)]
    os.kill(store.pid, signal.SIGKILL)
    port.wait_for(StoreLost)
    answered = [event.ticket for event in port.events if isinstance(event, StoreAnswer) and event.reply is None]
    assert sorted(answered) == tickets


def test_a_question_for_a_lost_store_does_not_reach_the_next(port: Port, store: StoreProcess) -> None:
    port.wait_for(StoreReady)
    ticket = port.remote.ask(Reserve(KEYS, [ROOT, *KEYS[:-1]], [True, False, False], 60.0))
    os.kill(store.pid, signal.SIGKILL)
    wait_until(lambda: any(isinstance(event, StoreReady) for event in port.remote._events))  # which the engine has not heard of yet
    port.remote.send()
    answer = port.wait_for(StoreAnswer)
    assert isinstance(answer, StoreAnswer)
    assert answer == (ticket, None)
    assert port.ask(Lookup(KEYS)).num_blocks == 0
    assert port.ask(Reserve(KEYS, [ROOT, *KEYS[:-1]], [True, False, False], 60.0)).lease_id == 1, "the first of this store"


def test_questions_leave_when_they_are_sent(port: Port) -> None:
    port.wait_for(StoreReady)
    tickets = [port.remote.ask(Lookup(KEYS)) for _ in range(2)]
    time.sleep(0.2)
    assert port.remote.poll() == []
    port.remote.send()
    assert [port.wait_for(StoreAnswer).ticket for _ in tickets] == tickets


def test_a_store_that_comes_late_is_found(tmp_path: Path, rank: tuple[int, int]) -> None:
    address = f"unix:{tmp_path}/late.sock"
    port = Port(address)
    with port.remote:
        port.remote.start(LAYOUT, [rank], port.woken.set)
        config = StoreConfig(memory_bytes=1 << 20, extent_bytes=1 << 20, secret=SECRET, directory=str(tmp_path), address=address)
        with StoreProcess(config) as process:
            process.start(30.0)
            port.wait_for(StoreReady)


def test_the_wrong_secret_never_attaches(store: StoreProcess, rank: tuple[int, int]) -> None:
    port = Port(store.address, "guess")
    with port.remote:
        port.remote.start(LAYOUT, [rank], port.woken.set)
        wait_until(lambda: port.remote._reason != "")
        assert port.remote.poll() == []
        assert port.remote.state is StoreState.CONNECTING


def test_questions_are_bounded(port: Port, store: StoreProcess) -> None:
    port.wait_for(StoreReady)
    os.kill(store.pid, signal.SIGSTOP)
    try:
        tickets = [port.remote.ask(Lookup(KEYS)) for _ in range(300)]
        assert None in tickets
        assert tickets.index(None) == 256
    finally:
        os.kill(store.pid, signal.SIGCONT)


def test_an_engine_warms_a_store_and_is_warmed_by_it(store: StoreProcess, rank: tuple[int, int]) -> None:
    info = make_info(64, max_model_len=200)._replace(pids=[rank])
    prompt = list(range(42))
    group = RealStoreGroup(info)

    def run(name: str, remote: RemoteStore, group: RealStoreGroup) -> Running:
        running = Running(group, store=remote)
        wait_until(lambda: running.engine.stats().store_state == "ready")
        running.engine.submit(make_request(name, prompt, max_tokens=3))
        assert running.tokens(name) == expected(prompt, 3)
        wait_until(lambda: running.engine.stats().blocks_pending_offer == 0)
        return running

    with RemoteStore(store.address, SECRET, "one", probe_every_s=0.1) as remote:
        first = run("a", remote, group)
        wait_until(lambda: first.engine.stats().leased_slots == 0)
        first.close()
    second_group = RealStoreGroup(info)
    second_group.arenas = group.arenas
    with RemoteStore(store.address, SECRET, "two", probe_every_s=0.1) as remote:
        second = run("b", remote, second_group)
        assert second.outputs[0, "b"][0].cached == [0, 40, 0, 0]
        assert second.outputs[0, "b"][0].receipt == [2, 10 * LAYOUT.block_bytes, {"partial_block": 2}]
        assert second_group.num_computed_tokens <= 2 + 3
        assert second.engine.offers.num_pending == 0, "what came from the store is not offered to it"
        os.kill(store.pid, signal.SIGKILL)
        second.engine.submit(make_request("c", [*prompt, 1], max_tokens=3))
        assert second.tokens("c") == expected([*prompt, 1], 3)
        wait_until(lambda: len(second_group.arenas) == 2)  # a restarted store has a new arena
        second.engine.submit(make_request("e", [*prompt, 2], max_tokens=3))
        assert second.tokens("e") == expected([*prompt, 2], 3)
        wait_until(lambda: second.engine.stats().store_state == "ready")
        wait_until(lambda: second.engine.stats().blocks_pending_offer == second.engine.stats().leased_slots == 0)
        assert second.engine.check() == []
        second.close()
    third_group = RealStoreGroup(info)
    third_group.arenas = second_group.arenas
    with RemoteStore(store.address, SECRET, "three", probe_every_s=0.1) as remote:
        third = run("d", remote, third_group)
        assert third.outputs[0, "d"][0].cached == [0, 40, 0, 0], "the new store was warmed again"
        third.close()
