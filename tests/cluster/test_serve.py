"""One deployment over real Ray and real gRPC: reuse across replicas, status, the command line, and a clean end."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtime.client import InferenceClient, RemoteError
from tests.cluster.conftest import Served, eventually, ids_request, wait_for_offers

pytestmark = pytest.mark.cluster


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(2, 512), k=length)


def test_a_deployment_from_start_to_ctrl_c(serve: Callable[..., Served], client_of: Callable[[Served], InferenceClient]) -> None:
    served = serve("--replicas", "2", "--tp", "2", "--policy", "round_robin")
    client = client_of(served)
    shared = prompt(1, 256)

    answers = []
    for _ in range(4):
        answers.append(client.generate(ids_request([*shared, 7]), 30.0))
        wait_for_offers(client)
    tiers = [answer.usage["cached_tokens_by_tier"] for answer in answers]
    assert tiers[0] == {"pages": 0, "dram": 0, "disk": 0, "peer": 0}
    assert tiers[1] == {"pages": 0, "dram": 256, "disk": 0, "peer": 0}
    assert [tier["pages"] for tier in tiers[2:]] == [256, 256]
    assert answers[0].replica_id == answers[2].replica_id != answers[1].replica_id == answers[3].replica_id
    assert {tuple(answer.token_ids) for answer in answers} == {tuple(answers[0].token_ids)}

    other_salt = client.generate(ids_request([*shared, 7], cache_salt="other"), 30.0)
    assert other_salt.usage["cached_tokens"] == 0
    assert other_salt.token_ids == answers[0].token_ids
    assert other_salt.usage["not_reused_tokens_by_reason"] == {"other_namespace": 256, "partial_block": 1}
    assert answers[1].usage["bytes_loaded"] > 0
    assert answers[1].usage["not_reused_tokens_by_reason"] == {"partial_block": 1}

    at_once = prompt(2, 256)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda last: client.generate(ids_request([*at_once, last]), 30.0), range(10, 18)))
    assert len({answer.replica_id for answer in together}) == 2
    computed = sum(answer.usage["computed_tokens"] for answer in together)
    assert computed <= 2 * len(at_once) + 8, "on each replica at most once; on one of them only, unless the other ran out of patience"

    [card] = client.models().models
    assert (card.architecture, card.vocab_size, card.takes_text) == ("DeepseekV3ForCausalLM", 512, False)
    with pytest.raises(RemoteError, match="INVALID_ARGUMENT.*token_ids"):
        client.generate(ids_request([100_000]), 30.0)

    command = [sys.executable, "-m", "runtime.cli"]
    status = subprocess.run(
        [*command, "status", "--json", "--deployment", served.deployment], capture_output=True, text=True, timeout=30, check=True
    )
    report = json.loads(status.stdout)
    assert [replica["state"] for replica in report["replicas"]] == ["ready", "ready"]
    assert [(replica["used_pages"], replica["leased_slots"], replica["running"]) for replica in report["replicas"]] == [(0, 0, 0)] * 2
    assert report["stores"][0]["state"] == "ready"
    assert report["stores"][0]["blocks"] >= 16

    line = subprocess.run(
        [*command, "generate", "--address", served.endpoint, "--token-ids", ",".join(map(str, [*shared, 7])), "--max-tokens", "8"]
        + ["--temperature", "0", "--ignore-eos", "--json"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    printed = json.loads(line.stdout)
    assert printed["token_ids"] == answers[0].token_ids
    assert printed["finish_reason"] == "length"
    assert printed["usage"]["cached_tokens"] == 256

    assert served.interrupt() == 0
    served.assert_nothing_left(20.0)


def test_a_killed_owner_leaves_nothing(serve: Callable[..., Served]) -> None:
    served = serve("--replicas", "1", "--tp", "2")
    served.process.kill()
    served.process.wait(10.0)
    served.assert_nothing_left(120.0)


def test_a_bad_folder_is_one_line_and_exit_code_1() -> None:
    done = subprocess.run([sys.executable, "-m", "runtime.cli", "serve", "/nowhere"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "/nowhere" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    usage = subprocess.run([sys.executable, "-m", "runtime.cli", "serve"], capture_output=True, text=True, timeout=60)
    assert usage.returncode == 2


def test_interrupting_a_start_leaves_nothing(tiny_mla: object) -> None:
    served = Served("serve", str(tiny_mla), "--port", "0", "--load-format", "dummy", "--replicas", "1", "--store-memory", "64MiB")
    try:
        eventually(lambda: bool(served.find("raylet")), 60.0, "the start of Ray")
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60.0) == 1
        served.assert_nothing_left(60.0)
    finally:
        served.close()
