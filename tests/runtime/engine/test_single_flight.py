"""Single flight over real stores: several engines, one store process, one prefix; and an engine that dies while others wait for it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_parts import make_request
from realtime import RealStoreGroup, Running, expected, wait_until
from simulated_group import make_info

from cache_store.config import StoreConfig
from cache_store.process import StoreProcess
from cache_store.processes import process_identity
from runtime.engine.store_port import RemoteStore

SECRET = "between us"
PREFIX = list(range(512))
BLOCK_SIZE = 16
NUM_REQUESTS = 8


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    config = StoreConfig(memory_bytes=1 << 20, extent_bytes=1 << 20, secret=SECRET, directory=str(tmp_path))
    with StoreProcess(config) as process:
        process.start(30.0)
        yield process


class Replica:
    """An engine with a port of its own; `rank` is the process that the store takes for its only one."""

    def __init__(self, store: StoreProcess, name: str, arenas: dict[str, object], step_s: float) -> None:
        self.rank = subprocess.Popen(["sleep", "600"])
        info = make_info(256, block_size=BLOCK_SIZE, max_model_len=1024)._replace(pids=[process_identity(self.rank.pid)])
        self.group = RealStoreGroup(info, step_s)
        self.group.arenas = arenas  # type: ignore[assignment]  # one arena: what one engine saves the other loads
        self.remote = RemoteStore(store.address, SECRET, name, probe_every_s=0.1)
        self.running = Running(self.group, store=self.remote, max_num_batched_tokens=64, single_flight_timeout_s=20.0)
        wait_until(lambda: self.running.engine.stats().store_state == "ready")

    def submit(self, name: str, tail: list[int]) -> None:
        self.running.engine.submit(make_request(name, [*PREFIX, *tail], max_tokens=2))

    def tokens(self, name: str) -> list[int]:
        return self.running.tokens(name)

    def close(self) -> None:
        self.running.close()
        self.remote.close()
        self.rank.kill()
        self.rank.wait()


@pytest.fixture
def replicas(store: StoreProcess) -> Iterator[list[Replica]]:
    arenas: dict[str, object] = {}
    replicas = [Replica(store, name, arenas, step_s=0.01) for name in ("one", "two")]
    yield replicas
    for replica in replicas:
        replica.close()


def test_a_prefix_that_many_want_at_once_is_computed_once(replicas: list[Replica]) -> None:
    tails = [[600 + i, 700 + i] for i in range(NUM_REQUESTS)]
    for i, tail in enumerate(tails):
        replicas[i % 2].submit(f"r{i}", tail)
    for i, tail in enumerate(tails):
        assert replicas[i % 2].tokens(f"r{i}") == expected([*PREFIX, *tail], 2)
    computed = sum(replica.group.num_computed_tokens for replica in replicas)
    assert computed == len(PREFIX) + NUM_REQUESTS * (2 + 1), "the prefix once; of each request its tail and one token more"
    loads = [replica.running.engine.loads for replica in replicas]
    assert sum(each.num_awaited > 0 for each in loads) == 1, "one of the two has waited"
    assert all(each.claims.num_blocks == 0 for each in loads)


def test_who_waits_for_a_replica_that_dies_computes_itself(replicas: list[Replica]) -> None:
    first, second = replicas
    first.group.gate.clear()  # it has claimed the prefix and gets no further
    first.submit("a", [600])
    wait_until(lambda: first.running.engine.loads.claims.num_blocks > 0)
    second.submit("b", [601])
    wait_until(lambda: "awaiting" in second.running.engine.loads.phases())
    assert second.group.num_computed_tokens == 0
    first.rank.kill()  # for the store, every process of that engine is gone
    assert second.tokens("b") == expected([*PREFIX, 601], 2)
    assert second.group.num_computed_tokens == len(PREFIX) + 2


def test_an_aborted_request_hands_its_claims_on(replicas: list[Replica]) -> None:
    first, second = replicas
    first.group.gate.clear()
    first.submit("a", [600])
    wait_until(lambda: first.running.engine.loads.claims.num_blocks > 0)
    second.submit("b", [601])
    wait_until(lambda: "awaiting" in second.running.engine.loads.phases())
    first.running.engine.abort((0, "a"))
    assert second.tokens("b") == expected([*PREFIX, 601], 2)
    assert second.group.num_computed_tokens == len(PREFIX) + 2
