"""A deployment over two nodes of a Ray cluster: raylets of one machine, each with a store and a front door of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from protos import inference_pb2 as pb
from runtime.client import Completion, InferenceClient
from runtime.controller.ray_cluster import START_ENVIRONMENT
from tests.cluster.conftest import Served, eventually, ids_request, marked_processes, new_mark, wait_for_offers

pytestmark = pytest.mark.cluster

# Prints its address; a line on stdin takes the second node down as a power cut would, the end of stdin all of it.
CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster

options = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}
cluster = Cluster(initialize_head=True, connect=False, head_node_args={**options, "include_dashboard": False})
second = cluster.add_node(**options)
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
    print("removed", flush=True)
cluster.shutdown()
"""
RAY_ENVIRONMENT = {**START_ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}
REPLACED_S = 30.0
NUM_SHARED = 1536  # more than a replica computes before it would ask
DEPLOYED = ("ray::Controller", "Actor", "cache_store.server")


class Nodes:
    """A cluster of two nodes, in a process of its own."""

    def __init__(self) -> None:
        self.mark = new_mark()
        name, value = self.mark.split("=")
        pipe = subprocess.PIPE
        environment = {**os.environ, **RAY_ENVIRONMENT, name: value, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._process.stdout
        self.environment = {**RAY_ENVIRONMENT, "RAY_ADDRESS": self._process.stdout.readline().strip()}

    def remove_second(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "removed\n"

    def actors(self) -> list[str]:
        """Of the deployment; a cluster has processes of its own."""
        return [command for command in marked_processes(self.mark).values() if any(name in command for name in DEPLOYED)]

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(60.0)
        self._process.stdout.close()
        eventually(lambda: not marked_processes(self.mark), 30.0, "the end of the cluster")


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.close()


def sampled(token_ids: list[int]) -> pb.GenerateRequest:
    request = ids_request(token_ids, max_tokens=200)
    request.sampling.MergeFrom(pb.SamplingParams(temperature=0.8, seed=len(token_ids), presence_penalty=0.5))
    return request


def test_a_prefix_crosses_nodes_and_a_node_that_dies_costs_seconds(
    nodes: Nodes, serve: Callable[..., Served], client_of: Callable[[Served], InferenceClient]
) -> None:
    served = serve("--replicas", "2", "--policy", "round_robin", environment=nodes.environment)
    client = client_of(served)
    rng = random.Random(4)
    shared: list[int] = []

    def crosses() -> bool:
        """Computed on one node, a prefix is fetched by the other, once the stores have found each other."""
        shared[:] = rng.choices(range(2, 512), k=NUM_SHARED)
        first = client.generate(ids_request(shared), 60.0)
        wait_for_offers(client)
        second = client.generate(ids_request(shared), 60.0)
        assert first.replica_id != second.replica_id
        assert second.token_ids == first.token_ids
        return bool(second.usage["cached_tokens_by_tier"]["peer"] >= NUM_SHARED - 16)

    eventually(crosses, 90.0, "a prefix from the other node's store")  # a tier that was slow once is tried again after half a minute
    prompts = [[*shared, *rng.choices(range(2, 512), k=1 + number)] for number in range(8)]
    with ThreadPoolExecutor(len(prompts)) as executor:

        def ask() -> list[Future[Completion]]:
            return [executor.submit(client.generate, sampled(prompt), 60.0) for prompt in prompts]

        quiet = [answer.result().token_ids for answer in ask()]
        answers = ask()
        eventually(lambda: all(row.running >= 3 for row in client.status().replicas), 20.0, "requests running on both nodes")
        nodes.remove_second()
        removed_s = time.monotonic()
        assert [answer.result().token_ids for answer in answers] == quiet, "those of the lost node went on at the other"

    def are_two_ready() -> bool:
        rows = client.status().replicas
        return len(rows) == 2 and all(row.state == "ready" for row in rows)

    eventually(are_two_ready, REPLACED_S, "a replica in place of the lost one")
    print(f"two replicas again {time.monotonic() - removed_s:.1f} s after a node was lost")
    assert {client.generate(ids_request(shared), 60.0).replica_id for _ in range(4)} == {row.replica_id for row in client.status().replicas}
    assert served.interrupt() == 0
    eventually(lambda: not nodes.actors(), 20.0, f"the end of {nodes.actors()}")
