"""Every way to end a request early, at every phase of its life, over real gRPC and a real engine: afterwards nothing is held anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from tests.runtime.frontdoor.conftest import Setup, ids_request, tokens_of
from tests.runtime.frontdoor.fake_engine import eventually
from tests.runtime.frontdoor.real_engine import RealEngine, SilentStore, expected

WAYS = ("cancel", "drop", "deadline", "abort")
PHASES = ("queued", "waiting for the store", "prefill", "decode", "finished")
DEADLINE_S = 0.6
WITNESS = [40, 41, 42]


def make_engine(phase: str) -> RealEngine:
    if phase == "queued":
        return RealEngine(max_num_seqs=1)
    if phase == "waiting for the store":
        return RealEngine(store=SilentStore(), load_timeout_s=60.0)
    return RealEngine(step_s=0.005 if phase == "decode" else 0.0, max_num_batched_tokens=16)


class Victim:
    """A request on a connection of its own."""

    def __init__(self, address: str, way: str) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = rpc.InferenceStub(self.channel)
        request = ids_request(list(range(100, 150)), max_tokens=140, ignore_eos=True)
        request.request_id = "victim"
        self.events: list[pb.GenerateEvent] = []
        self.call = self.stub.Generate(request, timeout=DEADLINE_S if way == "deadline" else 30)
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> grpc.StatusCode:
        try:
            async for event in self.call:
                self.events.append(event)
        except grpc.aio.AioRpcError as error:
            return error.code()
        except (asyncio.CancelledError, grpc.aio.UsageError):
            return grpc.StatusCode.CANCELLED
        return grpc.StatusCode.OK

    async def end(self, way: str, setup: Setup) -> grpc.StatusCode:
        if way == "cancel":
            self.call.cancel()
        elif way == "drop":
            await self.channel.close()
        elif way == "abort":
            answer = await setup.stub.Abort(pb.AbortRequest(request_id="victim"), timeout=5)
            assert answer.outcome == pb.ABORTED
        async with asyncio.timeout(10):
            return await self.reading


async def reach(phase: str, engine: RealEngine, victim: Victim) -> None:
    if phase == "queued":
        await eventually(lambda: engine.engine.stats().num_waiting == 1 and engine.engine.stats().num_running == 1)
    elif phase == "waiting for the store":
        await eventually(lambda: engine.engine.stats().num_waiting and engine._store.num_lookups)  # type: ignore[union-attr]
    elif phase == "prefill":
        await eventually(lambda: engine.engine.stats().num_running == 1)
        assert not tokens_of(victim.events)
    elif phase == "decode":
        await eventually(lambda: len(tokens_of(victim.events)) > 2)
    else:
        assert await victim.reading is grpc.StatusCode.OK
        assert victim.events[-1].finished.reason == pb.LENGTH


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", WAYS)
async def test_nothing_is_held_after_an_early_end(run_engines: Callable[..., Any], phase: str, way: str) -> None:
    engine = make_engine(phase)
    async with run_engines(engine) as setup:
        if phase in ("queued", "prefill"):
            engine.group.gate.clear()
        occupant = None
        if phase == "queued":
            occupant = asyncio.create_task(setup.generate(ids_request(WITNESS, max_tokens=8, ignore_eos=True), timeout=20))
            await eventually(lambda: engine.engine.stats().num_running == 1)
        victim = Victim(setup.address, way)
        await reach(phase, engine, victim)
        if phase == "finished":
            answer = await setup.stub.Abort(pb.AbortRequest(request_id="victim"), timeout=5)
            assert answer.outcome == pb.UNKNOWN_REQUEST
            victim.call.cancel()
        else:
            wanted = {"abort": grpc.StatusCode.OK, "deadline": grpc.StatusCode.DEADLINE_EXCEEDED}.get(way, grpc.StatusCode.CANCELLED)
            assert await victim.end(way, setup) is wanted
            if way == "abort":
                assert victim.events[-1].finished.reason == pb.ABORT
        engine.group.gate.set()
        if occupant is not None:
            assert tokens_of(await occupant) == expected(WITNESS, 8)
        await eventually(engine.is_idle)
        assert engine.engine.check() == []
        await eventually(lambda: len(setup.door._live) == 0)
        door = (await setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5)).front_door
        assert (door.live_requests, door.reserved_requests, door.reserved_tokens) == (0, 0, 0)
        setup.check_idle()
        await victim.channel.close()
        if phase != "waiting for the store":
            events = await setup.generate(ids_request(WITNESS, max_tokens=4, ignore_eos=True))
            assert tokens_of(events) == expected(WITNESS, 4)
        status = (
            {"cancel": "cancelled", "drop": "cancelled", "deadline": "deadline", "abort": "abort"}[way] if phase != "finished" else "length"
        )
        sample = setup.door.metrics.registry.get_sample_value
        assert sample("mobula:requests_total", {"status": status})


class Wire:
    """A TCP connection to the front door that can be cut without a word, as by a machine that loses its power."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._is_cut = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self._is_cut = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, far_writer]
        self._tasks |= {asyncio.create_task(self._copy(reader, far_writer)), asyncio.create_task(self._copy(far_reader, writer))}

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            if not self._is_cut:
                target.write(data)

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)


async def test_a_client_that_vanishes_without_a_word_is_noticed(run_engines: Callable[..., Any]) -> None:
    """No deadline, no end of stream: the front door's probe goes unanswered."""
    engine = RealEngine()
    async with run_engines(engine, keepalive_s=0.5) as setup:
        engine.group.gate.clear()
        wire = Wire(setup.address)
        async with grpc.aio.insecure_channel(await wire.start(), options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = rpc.InferenceStub(channel).Generate(ids_request(WITNESS, max_tokens=100, ignore_eos=True))
            reading = asyncio.ensure_future(call.read())
            await eventually(lambda: engine.engine.stats().num_running == 1)
            wire.cut()
            await eventually(lambda: len(setup.door._live) == 0, 10)
            engine.group.gate.set()
            await eventually(engine.is_idle)
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await wire.stop()
        sample = setup.door.metrics.registry.get_sample_value
        assert sample("mobula:requests_total", {"status": "cancelled"}) == 1
