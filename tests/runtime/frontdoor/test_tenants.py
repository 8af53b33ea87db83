"""API keys over real gRPC: who is let in, and that tenants share nothing and cannot touch each other's requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import inference_pb2 as pb
from runtime.api_keys import bearer, read_api_keys
from runtime.client import InferenceClient, RemoteError
from tests.runtime.frontdoor.conftest import Setup, ids_request, running, status_of, tokens_of
from tests.runtime.frontdoor.fake_engine import FakeEngine, eventually
from tests.runtime.frontdoor.real_engine import RealEngine, expected

KEYS = {"blue": "blue-key-1", "green": "green-key-1"}
PROMPT = list(range(10, 40))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text('blue = ["blue-key-0", "blue-key-1"]\ngreen = "green-key-1"\n')
    return file


@pytest.fixture
async def locked(folder: Path, key_file: Path) -> AsyncIterator[Setup]:
    """A front door that asks for keys, over a real engine."""
    async with running(folder, [RealEngine(step_s=0.002)], api_keys=read_api_keys(key_file)) as setup:
        yield setup


CALLS: dict[str, Any] = {
    "Generate": ids_request([5], max_tokens=1),
    "Abort": pb.AbortRequest(request_id="x"),
    "ListModels": pb.ListModelsRequest(),
    "Tokenize": pb.TokenizeRequest(text="x"),
    "Detokenize": pb.DetokenizeRequest(token_ids=[5]),
    "GetStatus": pb.GetStatusRequest(),
    "ListPins": pb.ListPinsRequest(),
    "Unpin": pb.UnpinRequest(all=True),
}


async def test_every_method_asks_for_a_key_but_health(locked: Setup) -> None:
    for metadata in ((), bearer("guess-guess"), (("authorization", "blue-key-1"),), (("authorization", "Basic blue-key-1"),)):
        for name, request in CALLS.items():
            error = await status_of(getattr(locked.stub, name)(request, timeout=5, metadata=metadata))
            assert (error.code(), error.details()[:14]) == (grpc.StatusCode.UNAUTHENTICATED, "authorization:")
    reflection = reflection_pb2_grpc.ServerReflectionStub(locked.channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    assert (await status_of(reflection.ServerReflectionInfo(asked, timeout=5))).code() is grpc.StatusCode.UNAUTHENTICATED
    answer = await health_pb2_grpc.HealthStub(locked.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    sample = locked.door.metrics.registry.get_sample_value
    assert sample("mobula:rpc_failures_total", {"method": "Generate", "reason": "unauthenticated"}) == 4
    made_up = locked.channel.unary_unary("/made.up/Method")
    assert (await status_of(made_up(b"", timeout=5))).code() is grpc.StatusCode.UNAUTHENTICATED
    assert sample("mobula:rpc_failures_total", {"method": "other", "reason": "unauthenticated"}) == 2  # and reflection
    assert sample("mobula:rpc_failures_total", {"method": "Method", "reason": "unauthenticated"}) is None
    for key in ("blue-key-0", "blue-key-1", "green-key-1"):
        for name, request in CALLS.items():
            call = getattr(locked.stub, name)(request, timeout=5, metadata=bearer(key))
            assert [event async for event in call][-1].HasField("finished") if name == "Generate" else await call is not None
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        assert [1 async for _ in reflection.ServerReflectionInfo(asked, timeout=5, metadata=bearer(key))] == [1]


async def test_tenants_never_share_cached_blocks(locked: Setup) -> None:
    cached = []
    for tenant in ("blue", "blue", "green", "green", "blue"):
        events = await locked.generate(ids_request(PROMPT, max_tokens=3, ignore_eos=True), metadata=bearer(KEYS[tenant]))
        assert tokens_of(events) == expected(PROMPT, 3)
        cached.append(events[0].started.num_cached_tokens)
    assert cached == [0, 28, 0, 28, 28]  # blocks of 4; the last token is always computed
    salted = ids_request(PROMPT, max_tokens=3, ignore_eos=True)
    salted.cache_salt = "green"
    assert (await locked.generate(salted, metadata=bearer(KEYS["blue"])))[0].started.num_cached_tokens == 0


async def test_tenants_cannot_abort_each_other_and_may_use_the_same_ids(locked: Setup) -> None:
    request = ids_request(PROMPT, max_tokens=150, ignore_eos=True)
    request.request_id = "mine"
    reading = {tenant: aiter(locked.stub.Generate(request, timeout=20, metadata=bearer(key))) for tenant, key in KEYS.items()}
    for unread in reading.values():
        await anext(unread)
    error = await status_of(locked.stub.Generate(request, timeout=5, metadata=bearer(KEYS["blue"])))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    other = ids_request(PROMPT, max_tokens=150, ignore_eos=True)
    other.request_id = "blue only"
    blue_only = aiter(locked.stub.Generate(other, timeout=20, metadata=bearer(KEYS["blue"])))
    await anext(blue_only)

    async def abort(tenant: str, request_id: str) -> int:
        answer = await locked.stub.Abort(pb.AbortRequest(request_id=request_id), timeout=5, metadata=bearer(KEYS[tenant]))
        return int(answer.outcome)

    assert await abort("green", "blue only") == pb.UNKNOWN_REQUEST
    assert await abort("green", "mine") == pb.ABORTED
    ends = {tenant: [event async for event in unread][-1].finished for tenant, unread in reading.items()}
    assert {tenant: end.reason for tenant, end in ends.items()} == {"blue": pb.LENGTH, "green": pb.ABORT}
    assert [event async for event in blue_only][-1].finished.reason == pb.LENGTH


async def test_the_tenant_reaches_the_engine_and_the_deployment_looks_with_its_secret(folder: Path, key_file: Path) -> None:
    engine = FakeEngine(secret="between us")
    async with running(folder, [engine], api_keys=read_api_keys(key_file), secret="between us") as setup:
        await setup.generate(ids_request([5], max_tokens=1), metadata=bearer(KEYS["green"]))
        assert engine.submitted[0].tenant == "green"
        assert (await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5, metadata=bearer("between us"))).replicas
        await eventually(lambda: len(setup.door._live) == 0)


async def test_the_blocking_client_presents_its_key(locked: Setup) -> None:
    def ask() -> None:
        with InferenceClient(locked.address, api_key=KEYS["blue"]) as client:
            assert client.generate(ids_request(PROMPT, max_tokens=2, ignore_eos=True), 10).token_ids == expected(PROMPT, 2)
            assert client.status().replicas
        with InferenceClient(locked.address) as client, pytest.raises(RemoteError, match="UNAUTHENTICATED"):
            client.status()

    await asyncio.to_thread(ask)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "holds no key"),
        ("blue", "keys.toml"),
        ('blue = "short"', "'blue'"),
        ("blue = 12345678", "'blue'"),
        ('"" = "long-enough"', "''"),
        ('blue = "long enough \\u00e9"', "'blue'"),
        ('blue = "the same key"\ngreen = "the same key"', "'green' and 'blue'"),
        ("blue = []", "holds no key"),
    ],
)
def test_a_bad_key_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=named):
        read_api_keys(file)
    with pytest.raises(ValueError, match="nowhere"):
        read_api_keys(tmp_path / "nowhere")
