"""What the death of each kind of process costs: seconds, never a wrong token."""

import os
import random
import signal
import threading
from collections.abc import Callable

import pytest

from runtime.client import Completion, InferenceClient, RemoteError
from tests.cluster.conftest import Served, eventually, ids_request, wait_for_offers

pytestmark = pytest.mark.cluster


def test_a_killed_store_costs_no_request_and_comes_back(
    serve: Callable[..., Served], client_of: Callable[[Served], InferenceClient]
) -> None:
    served = serve("--replicas", "2", "--tp", "2", "--policy", "round_robin")
    client = client_of(served)
    rng = random.Random(5)
    shared = rng.choices(range(2, 512), k=512)
    prompts = [[*shared, *rng.choices(range(2, 512), k=20)] for _ in range(8)]
    quiet = [client.generate(ids_request(ids, max_tokens=48), 60.0).token_ids for ids in prompts]
    wait_for_offers(client)

    [store] = served.find("cache_store.server")
    answers: list[Completion | Exception] = [RuntimeError("never ran")] * len(prompts)

    def run(number: int) -> None:
        try:
            answers[number] = client.generate(ids_request(prompts[number], max_tokens=48), 60.0)
        except RemoteError as error:
            answers[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    eventually(lambda: any(row.running for row in client.status().replicas), 20.0, "a running request")
    os.kill(store, signal.SIGKILL)
    for thread in threads:
        thread.join(60.0)
    assert [getattr(answer, "token_ids", answer) for answer in answers] == quiet

    # The restarted store is attached again and warms up from what the replicas still hold: no request is needed for that.
    def warm() -> bool:
        stores = client.status().stores
        return bool(stores) and stores[0].state == "ready" and stores[0].blocks >= 32

    eventually(warm, 30.0, "the new store warming up")
    assert served.find("cache_store.server") != [store]
    assert served.interrupt() == 0
    served.assert_nothing_left(20.0)


def test_a_killed_rank_ends_its_replica_and_another_is_made(
    serve: Callable[..., Served], client_of: Callable[[Served], InferenceClient]
) -> None:
    served = serve("--replicas", "2", "--tp", "2")
    client = client_of(served)
    before = {row.replica_id for row in client.status().replicas}
    expected = client.generate(ids_request([5, 6, 7]), 30.0).token_ids
    victim = served.find("ray::WorkerActor")[0]
    os.kill(victim, signal.SIGKILL)

    def replaced() -> bool:
        rows = client.status().replicas
        return len(rows) == 2 and all(row.state == "ready" for row in rows) and {row.replica_id for row in rows} != before

    eventually(replaced, 60.0, "a new replica")
    after = {row.replica_id for row in client.status().replicas}
    assert len(before & after) == 1
    for _ in range(4):
        assert client.generate(ids_request([5, 6, 7]), 30.0).token_ids == expected


def test_a_restarted_controller_adopts_what_runs(serve: Callable[..., Served], client_of: Callable[[Served], InferenceClient]) -> None:
    served = serve("--replicas", "1", "--tp", "1")
    client = client_of(served)
    before = [row.replica_id for row in client.status().replicas]
    [controller] = served.find("ray::Controller")
    os.kill(controller, signal.SIGKILL)
    eventually(lambda: served.find("ray::Controller") not in ([], [controller]), 60.0, "a new controller")
    expected = client.generate(ids_request([5, 6, 7]), 30.0).token_ids
    os.kill(served.find("ray::EngineActor")[0], signal.SIGKILL)

    def replaced() -> bool:
        rows = client.status().replicas
        return bool(rows) and rows[0].state == "ready" and [row.replica_id for row in rows] != before

    eventually(replaced, 60.0, "the new controller replacing a replica")
    assert client.generate(ids_request([5, 6, 7]), 30.0).token_ids == expected
    assert served.interrupt() == 0
    served.assert_nothing_left(20.0)
