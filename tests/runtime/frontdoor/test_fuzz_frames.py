"""Frames that no front door and no engine would send, at both ends of the real engine channel: only the stream that carried them ends, and
a witness beside it gets its own tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import frames
from runtime.engine.frames import EngineStats, Hello, Load, RequestOutput, StatusReply, StepFrame, Submit
from runtime.routing.types import Membership
from tests.runtime.frontdoor.conftest import membership
from tests.runtime.frontdoor.fake_engine import FakeEngine
from tests.runtime.frontdoor.real_engine import RealEngine, expected
from tests.runtime.frontdoor.stage import FUZZ, NUM_EXAMPLES, Stage, check_idle, report
from workers.step import SamplingSettings

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(max_size=8), st.binary(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=8,
)
SUBMIT = Submit("r", b"\5\0\0\0\6\0\0\0", b"", list(SamplingSettings()), 3, [7], "", "", None, 60.0)
DOOR_FRAMES = [SUBMIT, frames.Abort("r", "abort", 0), frames.StatusQuery(3)]
ENGINE_FRAMES = [
    StepFrame(
        [RequestOutput("r", [1, 2]), RequestOutput("s", [3], [[(3, -1.0)]], None, [0, 0, 0, 0], "stop", None, [0.0, 0.0])], Load(1, 2, 3)
    ),
    StatusReply(1, EngineStats(1, 2, 3, 4, 5, 6, 7, 8, 9, 0.5, "ready"), Load(1, 2, 3)),
    Hello("r0", "again", None, None, 4, 200, 1000),
]


@st.composite
def odd_submits(draw: st.DrawFn) -> bytes:
    """Requests whose fields are of their types and that no front door would send."""
    count = st.one_of(st.integers(-5, 5), st.integers(-(1 << 63), (1 << 64) - 1))
    return frames.encode(
        Submit(
            draw(st.text(max_size=3)),
            draw(st.binary(max_size=40)) * draw(st.sampled_from([1, 4])),
            draw(st.binary(max_size=4)) * draw(st.sampled_from([0, 4])),
            list(
                SamplingSettings(num_logprobs=draw(st.none() | st.integers(0, 3)), num_prompt_logprobs=draw(st.none() | st.integers(0, 3)))
            ),
            draw(count),
            draw(st.lists(count, max_size=3)),
            draw(st.text(max_size=2)),
            draw(st.text(max_size=2)),
            draw(st.none() | st.floats() | st.floats(0, 0.1)),
            draw(st.just(0.0) | st.floats()),
        )
    )


def payloads(good: list[Any]) -> st.SearchStrategy[bytes]:
    """Frames with one field of another kind, frames with changed bytes, values that are no frame, and noise."""

    @st.composite
    def one_field_wrong(draw: st.DrawFn) -> bytes:
        fields = list(msgpack.unpackb(frames.encode(draw(st.sampled_from(good)))))
        fields[draw(st.integers(0, len(fields) - 1))] = draw(VALUES)
        return bytes(msgpack.packb(fields))

    @st.composite
    def bytes_changed(draw: st.DrawFn) -> bytes:
        payload = bytearray(frames.encode(draw(st.sampled_from(good))))
        for _ in range(draw(st.integers(1, 3))):
            payload[draw(st.integers(0, len(payload) - 1))] = draw(st.integers(0, 255))
        return bytes(payload)

    return st.one_of(one_field_wrong(), bytes_changed(), VALUES.map(msgpack.packb), st.binary(max_size=40))


@settings(FUZZ, max_examples=5 * NUM_EXAMPLES)
@given(payloads([*DOOR_FRAMES, *ENGINE_FRAMES]))
def test_what_is_decoded_has_the_types_it_states(payload: bytes) -> None:
    try:
        frame = frames.decode(payload)
    except ValueError:
        return
    assert repr(frames.decode(frames.encode(frame))) == repr(frame)
    if isinstance(frame, Submit):
        assert {type(frame.prompt), type(frame.output)} == {bytes}
        assert (type(frame.max_tokens), type(frame.request_id)) == (int, str)
    if isinstance(frame, StepFrame):
        assert all(type(token) is int for output in frame.outputs for token in output.token_ids)


@pytest.fixture(scope="module")
def stage(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder, RealEngine())
    yield stage
    stage.close()


def test_any_frame_to_an_engine_is_survived(stage: Stage) -> None:
    """The engine ends the stream that sent it and goes on with the others."""
    counts: Counter[str] = Counter()
    address = f"127.0.0.1:{stage.engines[0].port}"

    async def send(batch: list[bytes]) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream(frames.METHOD)(metadata=((frames.SECRET_HEADER, ""),), timeout=10)
            assert isinstance(frames.decode(await call.read()), Hello)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
                for payload in batch:
                    await call.write(payload)
                await call.done_writing()
                while isinstance(await call.read(), bytes):
                    pass
            code, details = await call.code(), await call.details()
            if details != "Internal error from Core":  # grpc.aio's own word for a write that came after the engine had ended the stream
                counts[code.name] += len(batch)
                assert code.name in ("OK", "INVALID_ARGUMENT"), details

    async def together(batch: list[bytes]) -> None:
        await asyncio.gather(stage.witness(), send(batch))

    @FUZZ
    @given(st.lists(payloads(DOOR_FRAMES) | odd_submits(), min_size=1, max_size=4))
    def fuzz(batch: list[bytes]) -> None:
        stage.do(together(batch))

    fuzz()
    report("frames to an engine", counts)
    assert counts["INVALID_ARGUMENT"]
    check_idle(stage)


class BrokenEngine(FakeEngine):
    """Says Hello, then what nobody expects, one payload per stream."""

    def __init__(self, payloads: list[bytes]) -> None:
        super().__init__("broken")
        self.left = payloads

    async def _channel(self, requests: Any, context: Any) -> None:
        await context.write(frames.encode(self.hello))
        self.num_streams += 1
        if self.left:
            await context.write(self.left.pop())
        async for _ in requests:
            pass


def test_any_frame_from_an_engine_is_survived(folder: Path) -> None:
    """The front door drops the engine that sent it, comes back to it, and goes on with the others."""
    sent: list[bytes] = []

    @settings(FUZZ, max_examples=NUM_EXAMPLES // 2)
    @given(payloads(ENGINE_FRAMES))
    def collect(payload: bytes) -> None:
        sent.append(payload)

    collect()
    random.Random(1).shuffle(sent)
    broken, good = BrokenEngine(list(sent)), RealEngine("good")
    stage = Stage(folder, good)

    async def run() -> None:
        await broken.start()
        await stage.setup.door.set_membership(Membership(2, membership(2, broken, good).replicas))
        channel = stage.setup.door.router.channel("broken")
        assert channel is not None
        good_channel = stage.setup.door.router.channel("good")
        assert good_channel is not None
        for number in itertools.count():
            queue, outputs = good_channel.open(SUBMIT._replace(request_id=f"w{number}")), []
            while not outputs or outputs[-1].finish_reason is None:
                outputs += await queue.take(stage.setup.door.router.turnstile)
            assert [token for output in outputs for token in output.token_ids] == expected([5, 6], 3)
            if not broken.left:
                break
            assert channel._task is not None
            assert not channel._task.done()
            if channel.hello is not None:  # what it sent was a frame: make it send the next one
                await channel.close()
                channel.start()
        await stage.setup.door.set_membership(membership(3, good))
        await stage.witness()
        await broken.stop()

    try:
        stage.do(run())
        check_idle(stage)
        report("frames from an engine", Counter({"survived": len(sent)}))
    finally:
        stage.close()
