"""The engine channel over real gRPC: an engine with a simulated group on one side, raw streams of frames on the other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from array import array
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio
import pytest
from realtime import WAIT_S, RealtimeGroup, Running, expected, wait_until
from simulated_group import make_info

from runtime.engine import frames, server
from runtime.engine.frames import Abort, Frame, Hello, Load, RequestOutput, StatusQuery, StatusReply, StepFrame, Submit
from runtime.engine.server import EngineServer
from runtime.errors import GroupFailed
from workers.step import SamplingSettings

SECRET = "between us"


class Served:
    """An engine behind its server."""

    def __init__(self, group: RealtimeGroup, **config: object) -> None:
        self.server = EngineServer(secret=SECRET)
        self.group = group
        self.running = Running(group, sink=self.server.deliver, **config)
        self.engine = self.running.engine
        self.address = f"127.0.0.1:{self.server.start(self.engine)}"

    def close(self) -> None:
        self.running.close()
        self.server.stop()


class Door:
    """A front door's end of one stream."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        self.call = call

    async def send(self, frame: Frame) -> None:
        await self.call.write(frames.encode(frame))

    async def read(self) -> Frame:
        payload = await asyncio.wait_for(self.call.read(), WAIT_S)
        assert isinstance(payload, bytes), "the stream has ended"
        return frames.decode(payload)

    async def read_request(self, request_id: str) -> list[RequestOutput]:
        """All outputs of a request, until its last."""
        outputs: list[RequestOutput] = []
        while not outputs or not (outputs[-1].finish_reason or outputs[-1].error):
            frame = await self.read()
            if isinstance(frame, StepFrame):
                outputs += [output for output in frame.outputs if output.request_id == request_id]
        return outputs

    async def read_something(self) -> None:
        """Until a step has produced something."""
        while not (isinstance(frame := await self.read(), StepFrame) and frame.outputs):
            pass

    async def status(self) -> StatusReply:
        await self.send(StatusQuery(7))
        while not isinstance(frame := await self.read(), StatusReply):
            pass
        assert frame.query_id == 7
        return frame


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served(RealtimeGroup(make_info(64, max_model_len=200)))
    yield served
    served.close()


@pytest.fixture
def slow() -> Iterator[Served]:
    served = Served(RealtimeGroup(make_info(64, max_model_len=200), step_s=0.005))
    yield served
    served.close()


@contextlib.asynccontextmanager
async def door(served: Served, secret: str = SECRET) -> AsyncIterator[Door]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]  # a fixed window of 64 KiB of what is not read yet
    async with asyncio.timeout(6 * WAIT_S), grpc.aio.insecure_channel(served.address, options=options) as channel:
        call = channel.stream_stream(frames.METHOD)(metadata=((frames.SECRET_HEADER, secret),))
        yield Door(call)  # a heartbeat a second would let a wait for one frame go on for ever
        call.cancel()


def submit(request_id: str, prompt: list[int], max_tokens: int = 5, **fields: object) -> Submit:
    request = Submit(
        request_id, array("I", prompt).tobytes(), b"", list(SamplingSettings()), max_tokens, [], tenant="", cache_salt="", timeout_s=None
    )
    return request._replace(**fields)


async def test_hello_comes_first_and_a_request_gets_its_tokens(served: Served) -> None:
    async with door(served) as front:
        hello = await front.read()
        assert isinstance(hello, Hello)
        assert (hello.block_size, hello.max_model_len, hello.weights_digest) == (4, 200, b"weights")
        assert hello.root == served.engine.hello().root
        await front.send(submit("a", [1, 2, 3]))
        outputs = await front.read_request("a")
        assert [token for output in outputs for token in output.token_ids] == expected([1, 2, 3], 5)
        assert outputs[0].cached == [0, 0, 0, 0]
        assert outputs[-1].finish_reason == "length"
        assert outputs[-1].timings is not None


async def test_two_front_doors_may_use_the_same_id(served: Served) -> None:
    async with door(served) as one, door(served) as two:
        await one.send(submit("a", [1]))
        await two.send(submit("a", [2]))
        for front, prompt in ((one, [1]), (two, [2])):
            outputs = await front.read_request("a")
            assert [token for output in outputs for token in output.token_ids] == expected(prompt, 5)


async def test_the_wrong_secret_is_unauthenticated(served: Served) -> None:
    async with door(served, "guess") as front:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await front.read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_no_secret_is_unauthenticated(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = channel.stream_stream(frames.METHOD)()
        assert await asyncio.wait_for(call.code(), WAIT_S) is grpc.StatusCode.UNAUTHENTICATED


async def test_what_is_not_a_frame_ends_the_stream(served: Served) -> None:
    for payload in (
        b"\xff\x00rubbish",
        frames.encode(Hello("r", "i", None, None, 4, 4, 4)),
        frames.encode(submit("a", [1])._replace(prompt=b"123")),
    ):
        async with door(served) as front:
            await front.read()
            await front.call.write(payload)
            assert await asyncio.wait_for(front.call.code(), WAIT_S) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_broken_stream_aborts_its_requests_and_no_others(slow: Served) -> None:
    async with door(slow) as staying:
        async with door(slow) as leaving:
            await leaving.send(submit("a", [1, 2], max_tokens=190))
            await staying.send(submit("b", [3, 4], max_tokens=30))
            await leaving.read_something()
        outputs = await staying.read_request("b")
        assert [token for output in outputs for token in output.token_ids] == expected([3, 4], 30)
        wait_until(lambda: slow.engine.stats().used_pages == 0)
        assert slow.engine.load == Load(0, 0, 0)


async def test_an_abort_and_a_found_stop_string(slow: Served) -> None:
    async with door(slow) as front:
        await front.send(submit("a", [1, 2], max_tokens=190))
        await front.send(submit("s", [3, 4], max_tokens=190))
        await front.send(Abort("a", "abort", 0))
        await front.send(Abort("s", "stop", 1))
        await front.send(Abort("nobody", "abort", 0))
        reasons = {}
        while len(reasons) < 2:
            frame = await front.read()
            if isinstance(frame, StepFrame):
                reasons |= {output.request_id: output.finish_reason for output in frame.outputs if output.finish_reason}
        assert reasons == {"a": "abort", "s": "stop"}


async def test_a_timeout_is_enforced_by_the_engine(slow: Served) -> None:
    async with door(slow) as front:
        await front.send(submit("a", [1, 2], max_tokens=190, timeout_s=0.05))
        outputs = await front.read_request("a")
        assert outputs[-1].error is not None
        assert outputs[-1].error[0] == "DeadlinePassed"


async def test_refusals_are_answered(served: Served) -> None:
    full = Served(RealtimeGroup(make_info(64, max_model_len=200)), max_queued_requests=1, max_num_seqs=1)
    full.group.gate.clear()
    try:
        async with door(full) as front:
            await front.send(submit("a", [1, 2], max_tokens=2))
            while (await front.status()).stats.num_running == 0:  # until then it takes the one place in the queue
                pass
            for name in ("a", "b", "c", "d"):
                await front.send(submit(name, [1, 2], max_tokens=2))
            errors = {}
            while not {"a", "d"} <= set(errors):
                frame = await front.read()
                if isinstance(frame, StepFrame):
                    errors |= {output.request_id: output.error[0] for output in frame.outputs if output.error}
            assert errors["a"] == "DuplicateRequest"
            assert errors["d"] == "Overloaded"
    finally:
        full.close()
    async with door(served) as front:
        await front.send(submit("long", list(range(300))))
        assert (await front.read_request("long"))[-1].error[0] == "BadRequest"  # type: ignore[index]


async def test_status_says_what_the_engine_is_doing(slow: Served) -> None:
    async with door(slow) as front:
        await front.send(submit("a", [1, 2], max_tokens=150))
        while (reply := await front.status()).stats.num_running == 0:
            pass
        assert reply.stats.total_pages == 63
        assert reply.stats.used_pages > 0
        assert reply.load.num_running == 1
        assert reply.stats.store_state == "none"


async def test_the_load_is_told_while_it_changes_and_seldom_while_not(served: Served) -> None:
    async with door(served) as front:
        assert isinstance(await front.read(), Hello)
        began_s = time.monotonic()
        loads = [await front.read() for _ in range(2)]
        assert time.monotonic() - began_s >= 1.0, "an idle engine says so once a second"
        assert loads == [StepFrame([], Load(0, 0, 0))] * 2


async def test_the_weights_are_told_once_they_are_known() -> None:
    known = threading.Event()

    def digest() -> bytes:
        known.wait(WAIT_S)
        return b"weights"

    served = Served(RealtimeGroup(make_info(64, weights_digest=None)), digest=digest)
    try:
        async with door(served) as front:
            assert (await front.read()).weights_digest is None  # type: ignore[union-attr]
            known.set()
            while not isinstance(hello := await front.read(), Hello):
                pass
            assert (hello.weights_digest, hello.root) == (b"weights", served.engine.hello().root)
    finally:
        served.close()


async def test_a_dead_group_is_told_to_its_front_doors() -> None:
    served = Served(RealtimeGroup(make_info(64, max_model_len=200), step_s=0.005))
    try:
        async with door(served) as front:
            await front.send(submit("a", [1, 2], max_tokens=190))
            await front.read_something()
            served.group.failure = GroupFailed("rank 0 has gone")
            served.group.wake()
            outputs = await front.read_request("a")
            assert outputs[-1].error == ["GroupFailed", "rank 0 has gone"]
            await front.send(submit("late", [1]))
            assert (await front.read_request("late"))[-1].error == ["GroupFailed", "rank 0 has gone"]
    finally:
        served.close()


async def test_a_front_door_that_does_not_read_is_disconnected(slow: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNSENT_FRAMES", 8)
    slow.group.step_s = 0.0
    settings = list(SamplingSettings(num_prompt_logprobs=0, num_logprobs=0))
    async with door(slow) as front, door(slow) as reader:
        await reader.send(submit("r", [5], max_tokens=3))
        await reader.read_request("r")
        with contextlib.suppress(grpc.aio.AioRpcError):  # it is disconnected while it sends
            for i in range(3000):  # each answer is a few hundred bytes, more in all than the connection takes up unread
                await front.send(submit(f"{'long name ' * 30}{i}", [1, 2, 3], max_tokens=1, sampling=settings))
                if front.call.done():
                    break
        wait_until(lambda: slow.engine.load == Load(0, 0, 0))
        await reader.send(submit("r2", [5], max_tokens=3))
        assert (await reader.read_request("r2"))[-1].finish_reason == "length"
        deadline_s = time.monotonic() + WAIT_S
        while len(slow.server._streams) > 1:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)
