from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import generate_latest

from cache_store.config import StoreConfig
from cache_store.process import StoreProcess
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from runtime.engine.frames import Load
from runtime.errors import DeploymentError
from runtime.frontdoor.server import FrontDoor, FrontDoorConfig
from runtime.frontdoor.service import SERVICE
from runtime.routing.types import Membership, ReplicaMember, StoreMember
from runtime.text.tokenizer import Tokenizer
from tests.runtime.frontdoor.conftest import Setup, ids_request, membership, status_of, text_of, tokens_of
from tests.runtime.frontdoor.fake_engine import FakeEngine, eventually, tokens_plan
from tests.runtime.frontdoor.model_folder import MAX_MODEL_LEN, write_model

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_becomes(setup: Setup, wanted: int, service: str = "") -> None:
    stub = health_pb2_grpc.HealthStub(setup.channel)
    async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=5):
        if answer.status == wanted:
            return


async def test_health_follows_the_replicas(run_engines: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with run_engines(engine) as setup:
        await health_becomes(setup, SERVING)
        await health_becomes(setup, SERVING, SERVICE)
        await engine.stop()
        await health_becomes(setup, NOT_SERVING)
        error = await status_of(setup.stub.Generate(ids_request([5]), timeout=5))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "no replica is ready: r0 is ready" in error.details()
        await engine.start(engine.port)
        await health_becomes(setup, SERVING)
        assert tokens_of(await setup.generate(ids_request([5], max_tokens=3, ignore_eos=True))) == [1, 1, 1]
        await setup.door.set_membership(
            membership(2, engine)._replace(replicas=(ReplicaMember("r0", f"127.0.0.1:{engine.port}", "draining"),))
        )
        await health_becomes(setup, NOT_SERVING)


async def test_an_engine_that_answers_nothing_does_not_serve(run_engines: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with run_engines(engine, healthy_for_s=0.3, silence_limit_s=1.0) as setup:
        await health_becomes(setup, SERVING)
        engine.answers_status = False
        await health_becomes(setup, NOT_SERVING)
        engine.running.clear()
        error = await status_of(setup.stub.Generate(ids_request([5]), timeout=5))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "no answer in time" in error.details()


async def test_an_engine_whose_ranks_are_stuck_does_not_serve(run_engines: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with run_engines(engine) as setup:
        await health_becomes(setup, SERVING)
        engine.step_age_s = 61.0
        await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        await health_becomes(setup, NOT_SERVING)
        engine.step_age_s = 0.0
        await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        await health_becomes(setup, SERVING)


async def test_reflection_lists_the_services(one: Setup) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(one.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
    names = {service.name async for response in call for service in response.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


@pytest.fixture
def engine_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process and the address of its engine, which runs 100 steps a second."""
    command, pipe = [sys.executable, "-m", "tests.runtime.frontdoor.fake_engine", "40", "0.01"], subprocess.PIPE
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield process, f"127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


async def test_a_request_whose_engine_dies_ends_unavailable_at_once(
    run_engines: Callable[..., Any], engine_process: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = engine_process
    async with run_engines() as setup:
        await setup.door.set_membership(Membership(2, (ReplicaMember("r0", address, "ready"),)))
        await health_becomes(setup, SERVING)
        call = aiter(setup.stub.Generate(ids_request([5], max_tokens=400, ignore_eos=True), timeout=20))
        await anext(call)
        await anext(call)
        process.kill()
        killed_s = time.monotonic()
        error = await status_of(call)
        assert time.monotonic() - killed_s < 1.0
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "replica r0" in error.details()
        await health_becomes(setup, NOT_SERVING)
        assert setup.door.router.reserved() == {"r0": (0, 0)}


async def test_a_request_moves_on_while_nothing_of_it_was_seen(run_engines: Callable[..., Any]) -> None:
    engines = [FakeEngine("r0"), FakeEngine("r1")]
    for engine in engines:
        engine.running.clear()
    async with run_engines(*engines, policy="round_robin") as setup:
        call = setup.stub.Generate(ids_request([5], max_tokens=3, ignore_eos=True), timeout=10)
        await eventually(lambda: engines[0].submitted)
        engines[1].running.set()
        await engines[0].stop()
        events = [event async for event in call]
        assert tokens_of(events) == [1, 1, 1]
        assert events[0].started.replica_id == "r1"
        setup.check_idle()


async def test_a_request_that_has_begun_goes_on_at_another_replica(run_engines: Callable[..., Any]) -> None:
    """Its client sees one output: tokens, text and usage as if nothing had happened, and a stop string that spans the break."""
    words = list(range(20, 60))
    engines = {name: FakeEngine(name, tokens_plan(words), step_s=0.005) for name in ("r0", "r1")}
    async with run_engines(*engines.values(), policy="round_robin") as setup:
        for stop in ("", "spans the break"):
            request = ids_request([5], max_tokens=40, ignore_eos=True)
            unbroken = await setup.generate(request)
            if stop:
                request.sampling.stop.append(text_of(unbroken)[3:12])
                unbroken = await setup.generate(request)
            call = aiter(setup.stub.Generate(request, timeout=10))
            events = [await anext(call) for _ in range(3)]
            first = engines[events[0].started.replica_id]
            await first.stop()
            events += [event async for event in call]
            assert tokens_of(events) == tokens_of(unbroken)
            assert text_of(events) == text_of(unbroken)
            assert [event.HasField("started") for event in events].count(True) == 1
            assert events[-1].finished.usage == unbroken[-1].finished.usage
            assert (events[-1].finished.reason, events[-1].finished.stop_match) == (
                unbroken[-1].finished.reason,
                unbroken[-1].finished.stop_match,
            )
            await first.start(first.port)
            await eventually(lambda: len(setup.door.router._ready()) == 2)
        await eventually(lambda: set(setup.door.router.reserved().values()) == {(0, 0)})
        metrics = generate_latest(setup.door.metrics.registry).decode()
        assert "mobula:request_resumes_total 2.0" in metrics


async def test_a_wrong_secret_keeps_the_replica_out(folder: Path) -> None:
    engine = FakeEngine(secret="right")
    await engine.start()
    door = FrontDoor(FrontDoorConfig(str(folder), secret="wrong"))
    try:
        await door.start()
        await door.set_membership(membership(1, engine))
        channel = door.router.channel("r0")
        assert channel is not None
        await eventually(lambda: "UNAUTHENTICATED" in channel.problem)
        assert not door.router.is_serving(60)
    finally:
        await door.stop(0)
        await engine.stop()


async def test_status_shows_every_replica_and_store(run_engines: Callable[..., Any]) -> None:
    engine, silent = FakeEngine("r0"), FakeEngine("r1")
    async with run_engines(engine, silent, status_timeout_s=0.3) as setup:
        silent.answers_status = False
        members = (
            *membership(2, engine, silent).replicas,
            ReplicaMember("r2", "", "loading", "weights 3 of 8", 2),
            ReplicaMember("r3", "127.0.0.1:1", "lost", "rank 1 died"),
        )
        stores = (StoreMember("n0", "", "starting"), StoreMember("n1", "unix:/nowhere/at/all"))
        await setup.door.set_membership(Membership(2, members, stores))
        status = await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        replicas = {replica.replica_id: replica for replica in status.replicas}
        first = replicas["r0"]
        assert (first.state, first.waiting, first.total_pages, first.used_pages, first.cached_pages) == ("ready", 3, 100, 40, 20)
        assert (first.blocks_pending_offer, first.leased_slots, first.num_preemptions, first.step_age_s) == (5, 6, 7, 0.5)
        assert (replicas["r1"].state, replicas["r1"].detail) == ("lost", "no answer in 0.3 s")
        assert (replicas["r2"].state, replicas["r2"].detail, replicas["r2"].tensor_parallel_size) == ("loading", "weights 3 of 8", 2)
        assert (replicas["r3"].state, replicas["r3"].detail) == ("lost", "rank 1 died")
        assert [(store.node_id, store.state) for store in status.stores] == [("n0", "starting"), ("n1", "lost")]


async def test_status_asks_the_stores(run_engines: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    disk = {"disk_bytes": 1 << 20, "disk_directory": str(tmp_path / "disk")}
    config = StoreConfig(memory_bytes=1 << 20, extent_bytes=1 << 20, secret="between us", directory=str(tmp_path), **disk)
    with StoreProcess(config) as store:
        address = await asyncio.to_thread(store.start)
        async with run_engines(FakeEngine(secret="between us"), secret="between us") as setup:
            await setup.door.set_membership(membership(2, *setup.engines)._replace(stores=(StoreMember("n0", address),)))
            (status,) = (await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)).stores
            assert (status.node_id, status.state, status.total_bytes, status.leased_slots) == ("n0", "ready", 1 << 20, 0)
            assert (status.disk_total_bytes, status.num_peers, status.pinned_bytes) == (1 << 20, 0, 0)
            await asyncio.to_thread(store.stop)
            (status,) = (await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)).stores
            assert status.state == "lost"


async def test_models_tokenize_detokenize(one: Setup, folder: Path, tokenizer: Tokenizer) -> None:
    (card,) = (await one.stub.ListModels(pb.ListModelsRequest(), timeout=5)).models
    assert (card.name, card.architecture, card.max_model_len) == (folder.name, "LlamaForCausalLM", MAX_MODEL_LEN)
    assert (card.takes_text, card.takes_chat) == (True, True)
    text = "the fox 😀 jumps"
    tokens = await one.stub.Tokenize(pb.TokenizeRequest(text=text), timeout=5)
    assert list(tokens.token_ids) == list(tokenizer.encode(text, add_special_tokens=True))
    assert (await one.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids), timeout=5)).text == text
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    tokens = await one.stub.Tokenize(pb.TokenizeRequest(messages=chat), timeout=5)
    await one.generate(pb.GenerateRequest(messages=chat, sampling=pb.SamplingParams(max_tokens=1)))
    assert one.engines[0].submitted[0].prompt == b"".join(token.to_bytes(4, "little") for token in tokens.token_ids)
    error = await status_of(one.stub.Tokenize(pb.TokenizeRequest(), timeout=5))
    assert (error.code(), error.details()[:6]) == (grpc.StatusCode.INVALID_ARGUMENT, "input:")


async def test_without_a_tokenizer(run_engines: Callable[..., Any], tmp_path: Path) -> None:
    engine = FakeEngine()
    async with run_engines(engine, folder=write_model(tmp_path, tokenizer=False)) as setup:
        (card,) = (await setup.stub.ListModels(pb.ListModelsRequest(), timeout=5)).models
        assert (card.takes_text, card.takes_chat) == (False, False)
        error = await status_of(setup.stub.Generate(pb.GenerateRequest(text="hi"), timeout=5))
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        events = await setup.generate(ids_request([5], max_tokens=2, ignore_eos=True))
        assert tokens_of(events) == [1, 1]


async def test_messages_over_the_limit_are_refused(run_engines: Callable[..., Any]) -> None:
    async with run_engines(FakeEngine(), max_message_bytes=10_000) as setup:
        error = await status_of(setup.stub.Generate(pb.GenerateRequest(text="x" * 20_000), timeout=5))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await setup.generate(ids_request([5], max_tokens=1)))[-1].HasField("finished")


async def test_unexpected_errors_are_internal_and_logged_with_an_id(one: Setup, caplog: pytest.LogCaptureFixture) -> None:
    def plan(submit: Any) -> list[Any]:
        return [*tokens_plan()(submit)[:1], tokens_plan()(submit)[0]._replace(finish_reason="no such reason")]

    one.engines[0].plan = plan
    error = await status_of(one.stub.Generate(ids_request([5], max_tokens=9, ignore_eos=True), timeout=5))
    assert error.code() == grpc.StatusCode.INTERNAL
    error_id = error.details().split()[2].rstrip(":")
    assert any(error_id in record.getMessage() and record.exc_info for record in caplog.records)


async def test_a_port_in_use_is_named(one: Setup, folder: Path) -> None:
    port = int(one.address.rpartition(":")[2])
    door = FrontDoor(FrontDoorConfig(str(folder), port=port))
    with pytest.raises(DeploymentError, match=f"127.0.0.1:{port}"):
        await door.start()
    await door.stop(0)


async def test_stopping_lets_running_requests_finish(folder: Path) -> None:
    engine = FakeEngine(step_s=0.005)
    await engine.start()
    door = FrontDoor(FrontDoorConfig(str(folder)))
    address = await door.start()
    await door.set_membership(membership(1, engine))
    await eventually(lambda: door.router.is_serving(60))
    async with grpc.aio.insecure_channel(address) as channel:
        call = aiter(rpc.InferenceStub(channel).Generate(ids_request([5], max_tokens=40, ignore_eos=True), timeout=10))
        events = [await anext(call)]
        stopping = asyncio.create_task(door.stop(10))
        events += [event async for event in call]
        assert len(tokens_of(events)) == 40
        async with asyncio.timeout(5):
            await stopping
    await engine.stop()


async def test_work_goes_where_the_load_is_least(run_engines: Callable[..., Any]) -> None:
    engines = [FakeEngine("r0"), FakeEngine("r1")]
    engines[0].load = Load(50, 10, 9000)
    async with run_engines(*engines, policy="least_loaded") as setup:
        await eventually(lambda: engines[0].num_streams)
        status = await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)  # a reply carries the load
        assert len(status.replicas) == 2
        for _ in range(4):
            await setup.generate(ids_request([5], max_tokens=1))
        assert (len(engines[0].submitted), len(engines[1].submitted)) == (0, 4)


async def test_a_shared_prefix_stays_on_its_replica(run_engines: Callable[..., Any]) -> None:
    engines = [FakeEngine("r0"), FakeEngine("r1")]
    async with run_engines(*engines, policy="prefix_affinity") as setup:
        shared = list(range(10, 110))
        await setup.generate(ids_request(shared, max_tokens=1))
        home = next(engine for engine in engines if engine.submitted)
        home.load = Load(3, 0, 200)
        await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        for tail in range(4):
            await setup.generate(ids_request([*shared, 120 + tail], max_tokens=1))
        assert len(home.submitted) == 5
        await setup.generate(ids_request(list(range(110, 210)), max_tokens=1))
        assert sum(len(engine.submitted) for engine in engines if engine is not home) == 1
        salted = ids_request(shared, max_tokens=1)
        salted.cache_salt = "mine"
        await setup.generate(salted)
        assert len(home.submitted) == 5
