"""A busy service over real Ray and real gRPC: 200 requests of which many are aborted, cancelled or late; and two tenants side by side."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from runtime.api_keys import bearer
from runtime.client import InferenceClient, RemoteError
from tests.cluster.conftest import Served, eventually, ids_request, wait_for_offers

pytestmark = pytest.mark.cluster

NUM_REQUESTS = 200
FATES = ("finish", "finish", "finish", "abort", "cancel", "deadline")
KEYS = {"blue": "blue-key-1", "green": "green-key-1"}


@dataclass
class Planned:
    """One request and how it is to end."""

    request: pb.GenerateRequest
    fate: str
    after_tokens: int  # abort or cancel once so many have come
    deadline_s: float
    token_ids: list[int] = field(default_factory=list)
    status: str = ""


def plan_requests(seed: int) -> list[Planned]:
    """Random lengths, a third of the prompts with one of a few long prefixes; greedy and seeded draws in turn."""
    rng = random.Random(seed)
    prefixes = [rng.choices(range(2, 512), k=rng.randrange(40, 300)) for _ in range(6)]
    planned = []
    for number in range(NUM_REQUESTS):
        prompt = (rng.choice(prefixes) if number % 3 == 0 else []) + rng.choices(range(2, 512), k=rng.choice((1, 5, 20, 60, 200)))
        sampling = pb.SamplingParams(max_tokens=rng.randrange(1, 25), ignore_eos=True, temperature=rng.choice((0.0, 0.8, 1.2)), seed=number)
        if number % 5 == 0:
            sampling.frequency_penalty, sampling.top_p = 0.3, 0.9
        request = pb.GenerateRequest(request_id=f"n{number}", token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
        planned.append(Planned(request, rng.choice(FATES), rng.randrange(0, 6), rng.uniform(0.005, 1.5)))
    return planned


async def run_one(stub: Any, planned: Planned) -> None:
    """Ends `planned` as its fate says, and keeps what came."""
    timeout_s = planned.deadline_s if planned.fate == "deadline" else 120.0
    call = stub.Generate(planned.request, timeout=timeout_s, metadata=bearer(KEYS["blue"]))

    async def intervene() -> None:
        if planned.fate == "abort":
            await stub.Abort(pb.AbortRequest(request_id=planned.request.request_id), timeout=30, metadata=bearer(KEYS["blue"]))
        elif planned.fate == "cancel":
            call.cancel()

    has_intervened = False
    try:
        async for event in call:
            planned.token_ids += event.tokens.token_ids
            if event.HasField("finished"):
                planned.status = pb.FinishReason.Name(event.finished.reason)
                del planned.token_ids[event.finished.usage.num_completion_tokens :]
            if not has_intervened and len(planned.token_ids) >= planned.after_tokens:
                has_intervened = True
                await intervene()
    except grpc.aio.AioRpcError as error:
        planned.status = error.code().name
    except asyncio.CancelledError:
        planned.status = "CANCELLED"


async def run_busy(endpoint: str, planned: list[Planned]) -> None:
    """All at once, within a second."""
    rng = random.Random(1)
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub = rpc.InferenceStub(channel)

        async def later(entry: Planned) -> None:
            await asyncio.sleep(rng.random())  # arrivals, not a wait for anything
            await run_one(stub, entry)

        await asyncio.gather(*map(later, planned))


def is_all_zero(status: pb.GetStatusResponse) -> bool:
    replicas = [(row.running, row.waiting, row.used_pages, row.leased_slots) for row in status.replicas]
    door = status.front_door
    return (
        set(replicas) == {(0, 0, 0, 0)}
        and (door.live_requests, door.reserved_requests, door.reserved_tokens) == (0, 0, 0)
        and all(store.leased_slots == 0 for store in status.stores)
    )


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text("".join(f'{tenant} = "{key}"\n' for tenant, key in KEYS.items()))
    return file


def test_two_hundred_requests_and_two_tenants(serve: Callable[..., Served], key_file: Path) -> None:
    names = ("--served-model-name", "tiny", "--served-model-name", "tiny-latest")
    limits = ("--max-num-seqs", "32", "--max-num-batched-tokens", "512", "--max-prompt-tokens-beside-outputs", "64")
    served = serve("--replicas", "2", "--api-keys", str(key_file), "--metrics-port", "0", *limits, *names)
    with (
        InferenceClient(served.endpoint, api_key=KEYS["blue"]) as blue,
        InferenceClient(served.endpoint, api_key=KEYS["green"]) as green,
        InferenceClient(served.endpoint) as nobody,
    ):
        with pytest.raises(RemoteError, match="UNAUTHENTICATED"):
            nobody.status()
        assert [card.name for card in blue.models().models] == ["tiny", "tiny-latest"]
        check_busy_run(served.endpoint, blue)
        check_tenants(blue, green)
        check_command_line(served.endpoint)
        check_killed_client(served.endpoint, blue)
        metrics = blue.status().front_door.metrics_address
    text = urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10).read().decode()
    assert "mobula:num_requests_running{" in text
    assert f"metrics http://{metrics}/metrics" in "".join(served.errors)
    assert served.interrupt() == 0
    served.assert_nothing_left(20.0)


def check_busy_run(endpoint: str, client: InferenceClient) -> None:
    planned = plan_requests(seed=3)
    asyncio.run(run_busy(endpoint, planned))
    endings = Counter((entry.fate, entry.status) for entry in planned)
    print("\n" + ", ".join(f"{count} {fate}: {status}" for (fate, status), count in sorted(endings.items())))
    allowed = {
        "finish": {"LENGTH"},
        "abort": {"ABORT", "LENGTH"},
        "cancel": {"CANCELLED", "LENGTH"},
        "deadline": {"DEADLINE_EXCEEDED", "LENGTH"},
    }
    assert all(status in allowed[fate] for fate, status in endings), endings
    assert {status for _, status in endings} == {"LENGTH", "ABORT", "CANCELLED", "DEADLINE_EXCEEDED"}
    eventually(lambda: is_all_zero(client.status()), 20.0, f"an idle service: {client.status()}")
    for entry in planned:
        quiet = client.generate(entry.request, 60.0).token_ids
        if entry.status == "LENGTH":
            assert entry.token_ids == quiet, entry.request.request_id
        else:
            assert entry.token_ids == quiet[: len(entry.token_ids)], entry.request.request_id
    eventually(lambda: is_all_zero(client.status()), 20.0, "an idle service")


def check_tenants(blue: InferenceClient, green: InferenceClient) -> None:
    """Over both replicas' pages and the store: what blue has paid for is found by blue alone."""
    prompt = random.Random(9).choices(range(2, 512), k=256)
    first = blue.generate(ids_request([*prompt, 7], pin_ttl_s=600.0), 30.0)
    assert first.usage["pin"] == "taken"
    eventually(lambda: [pin.num_blocks for pin in blue.list_pins().pins] == [16], 20.0, "a pin of the whole prefix")
    assert list(green.list_pins().pins) == []
    wait_for_offers(blue)
    stored = blue.status().stores[0].blocks
    others = green.generate(ids_request([*prompt, 7]), 30.0)
    again = blue.generate(ids_request([*prompt, 7]), 30.0)
    assert [answer.usage["cached_tokens"] for answer in (first, others, again)] == [0, 0, 256]
    assert first.token_ids == others.token_ids == again.token_ids
    wait_for_offers(green)
    assert green.status().stores[0].blocks >= stored + 16  # blocks of its own, of the same tokens
    assert (green.unpin(everything=True).num_unpinned, blue.unpin(everything=True).num_unpinned) == (0, 1)


def check_command_line(endpoint: str) -> None:
    """The key as an option and from the environment, and what is said without one."""
    command = [sys.executable, "-m", "runtime.cli"]
    generate = [
        *command,
        "generate",
        "--address",
        endpoint,
        "--token-ids",
        "5,6,7",
        "--max-tokens",
        "2",
        "--json",
        "--api-key",
        KEYS["green"],
    ]
    done = subprocess.run(generate, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] in (1, 2)
    environment = {**os.environ, "MOBULA_API_KEY": KEYS["green"]}
    status = [*command, "status", "--address", endpoint, "--json"]
    done = subprocess.run(status, capture_output=True, text=True, timeout=30, check=True, env=environment)
    assert [row["state"] for row in json.loads(done.stdout)["replicas"]] == ["ready", "ready"]
    done = subprocess.run(status, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr[:24]) == (1, "mobula: UNAUTHENTICATED:")


def check_killed_client(endpoint: str, client: InferenceClient) -> None:
    """A client process that is killed in the middle of its stream leaves nothing running."""
    command = [sys.executable, "-m", "runtime.cli", "generate", "--address", endpoint, "--token-ids", "5,6,7", "--ignore-eos"]
    with subprocess.Popen([*command, "--api-key", KEYS["green"]], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(8), "tokens come"
        assert client.status().front_door.live_requests == 1
        process.kill()
    eventually(lambda: is_all_zero(client.status()), 20.0, "the end of a request whose client was killed")
