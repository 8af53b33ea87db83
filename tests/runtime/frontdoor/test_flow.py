"""Slow readers over real gRPC: bounded memory, nobody else slowed down; and who is served first when much is asked at once."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from protos import inference_pb2_grpc as rpc
from runtime.engine.frames import RequestOutput
from runtime.routing.output_queue import MAX_UNREAD, OutputQueue
from tests.runtime.frontdoor.conftest import ids_request, running, status_of, tokens_of
from tests.runtime.frontdoor.fake_engine import FakeEngine, eventually, tokens_plan
from tests.runtime.frontdoor.model_folder import write_model
from tests.runtime.frontdoor.real_engine import RealEngine, expected

LONG = 300_000
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("long"))
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": LONG}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
async def stalled(long_folder: Path) -> AsyncIterator[tuple[Any, grpc.aio.UnaryStreamCall[Any, Any]]]:
    """A setup, and a client that has read one event of a very long output and reads no further."""
    engine = FakeEngine(plan=tokens_plan([40, 300, 310], tokens_per_step=50), max_model_len=LONG)
    async with running(long_folder, [engine]) as setup, grpc.aio.insecure_channel(setup.address, options=SMALL_WINDOW) as channel:
        call = rpc.InferenceStub(channel).Generate(ids_request([5], max_tokens=LONG - 10, ignore_eos=True), timeout=60)
        await anext(aiter(call))
        yield setup, call


async def test_a_reader_that_stops_holds_little_and_in_the_end_loses_its_request(stalled: tuple[Any, Any]) -> None:
    setup, call = stalled
    sample = setup.door.metrics.registry.get_sample_value
    engine, channel = setup.engines[0], setup.door.router.channel("r0")
    await eventually(lambda: any(queue.num_unread > 1000 for queue in channel._queues.values()), 20)
    (queue,) = channel._queues.values()
    sent = sample("mobula:generation_tokens_total")  # the window is full: what follows waits here
    others = [tokens_of(await setup.generate(ids_request([6], max_tokens=300, ignore_eos=True))) for _ in range(3)]
    assert [len(tokens) for tokens in others] == [300] * 3
    seen = []
    while not engine.aborted:
        seen.append(queue.num_unread)
        await asyncio.sleep(0.005)
    assert 0 < max(seen) <= MAX_UNREAD
    assert sample("mobula:generation_tokens_total") - 900 <= sent + 2 * 256, "nothing is written to a window that is full"
    assert queue.num_unread == 0
    assert channel.num_live == 0
    error = await status_of(call)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "reads too slowly" in error.details()
    await eventually(lambda: set(setup.door.router.reserved().values()) == {(0, 0)})


async def test_a_reader_that_never_reads_does_not_keep_its_place(long_folder: Path) -> None:
    """Its output is small enough to wait for it, but not for ever."""
    engine = FakeEngine(plan=tokens_plan([40, 300, 310], tokens_per_step=50), max_model_len=LONG)
    async with running(long_folder, [engine], write_timeout_s=0.5) as setup:
        async with grpc.aio.insecure_channel(setup.address, options=SMALL_WINDOW) as channel:
            call = rpc.InferenceStub(channel).Generate(ids_request([5], max_tokens=60_000, ignore_eos=True))
            unread = aiter(call)
            await anext(unread)
            await eventually(lambda: len(setup.door._live) == 0, 10)
            setup.check_idle()
            error = await status_of(unread)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "has taken nothing" in error.details()
        assert len(tokens_of(await setup.generate(ids_request([6], max_tokens=300, ignore_eos=True)))) == 300


def test_unread_tokens_take_little_memory() -> None:
    queue = OutputQueue(LONG)
    tracemalloc.start()
    try:
        for token in range(MAX_UNREAD):
            queue.put(RequestOutput("x", [1000 + token]))
        assert tracemalloc.get_traced_memory()[0] < 4 << 20  # 65,536 tokens
    finally:
        tracemalloc.stop()


async def test_short_prompts_pass_a_long_one_that_is_being_computed(run_engines: Callable[..., Any]) -> None:
    """A prompt of 150 tokens in steps of 8 takes 19 steps; two that came after it are through before it is."""
    engine = RealEngine(max_num_batched_tokens=8, step_s=0.002)
    async with run_engines(engine) as setup:
        order: list[str] = []

        async def run(name: str, prompt: list[int]) -> None:
            assert tokens_of(await setup.generate(ids_request(prompt, max_tokens=2, ignore_eos=True))) == expected(prompt, 2)
            order.append(name)

        long = asyncio.create_task(run("long", list(range(100, 250))))
        await eventually(lambda: engine.engine.stats().num_running == 1)
        await asyncio.gather(run("short", [1, 2, 3]), run("also short", [4, 5, 6, 7]))
        await long
        assert order[-1] == "long"


async def test_requests_of_equal_length_are_served_in_order(run_engines: Callable[..., Any]) -> None:
    engine = RealEngine(max_num_seqs=1)
    async with run_engines(engine) as setup:
        engine.group.gate.clear()
        order: list[int] = []

        async def run(number: int) -> None:
            await setup.generate(ids_request([number] * 6, max_tokens=3, ignore_eos=True))
            order.append(number)

        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(run(number)))
            await eventually(lambda: engine.engine.stats().num_running + engine.engine.stats().num_waiting == len(tasks))
        engine.group.gate.set()
        await asyncio.gather(*tasks)
        assert order == list(range(6))


@pytest.mark.parametrize(("limit", "named"), [({"max_queued_requests": 2}, "requests wait"), ({"max_queued_tokens": 80}, "prompt queues")])
async def test_a_full_queue_is_answered_with_a_hint_and_takes_again_later(
    run_engines: Callable[..., Any], limit: dict[str, int], named: str
) -> None:
    engine = RealEngine(max_num_seqs=1, **limit)
    async with run_engines(engine) as setup:
        engine.group.gate.clear()
        prompts = [list(range(start, start + 25)) for start in (100, 140, 180, 220)]
        first = asyncio.create_task(setup.generate(ids_request(prompts[0], max_tokens=4, ignore_eos=True)))
        await eventually(lambda: engine.engine.stats().num_running == 1)
        waiting = [asyncio.create_task(setup.generate(ids_request(prompt, max_tokens=4, ignore_eos=True))) for prompt in prompts[1:3]]
        await eventually(lambda: engine.engine.stats().num_waiting == 2)
        error = await status_of(setup.stub.Generate(ids_request(prompts[3], max_tokens=4), timeout=5))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert named in error.details()
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        engine.group.gate.set()
        answers = await asyncio.gather(first, *waiting)
        assert [tokens_of(events) for events in answers] == [expected(prompt, 4) for prompt in prompts[:3]]
        assert tokens_of(await setup.generate(ids_request(prompts[3], max_tokens=4, ignore_eos=True))) == expected(prompts[3], 4)
        await eventually(engine.is_idle)
