"""Input that nobody would send, over real gRPC: every call ends with a status, no process ends, and a witness that runs all the while gets
its own tokens.

`MOBULA_FUZZ_EXAMPLES=3000 python -m pytest tests/runtime/frontdoor/test_fuzz.py -s` sends more, and prints how many of what were sent and
how they ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import msgpack
import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from runtime.engine import frames
from runtime.engine.frames import EngineStats, Hello, Load, RequestOutput, StatusReply, StepFrame, Submit
from runtime.frontdoor.service import SERVICE
from runtime.loop import LoopThread
from runtime.routing.types import Membership
from tests.runtime.frontdoor.conftest import Setup, ids_request, membership, running, tokens_of
from tests.runtime.frontdoor.fake_engine import FakeEngine, eventually
from tests.runtime.frontdoor.real_engine import RealEngine, expected
from workers.step import SamplingSettings

T = TypeVar("T")

WITNESS = list(range(60, 90))
NUM_WITNESS_TOKENS = 12
OWN_STATUSES = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
NAMES_A_FIELD = re.compile(r"[a-z_]+(\[\d+\])?(\.[a-z_]+)*: ")
NUM_EXAMPLES = int(os.environ.get("MOBULA_FUZZ_EXAMPLES", "120"))
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)

TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(["", "x" * 5000, "<s>", "\0", "\ud7ff\ue000", "user", "😀" * 300]))
NUMBERS = {
    FieldDescriptor.TYPE_FLOAT: st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, -1.0, 1e-45, 3e38, float("nan"), float("inf")])),
    FieldDescriptor.TYPE_INT32: st.one_of(st.integers(-3, 30), st.integers(-(1 << 31), (1 << 31) - 1)),
    FieldDescriptor.TYPE_INT64: st.integers(-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT32: st.one_of(st.integers(0, 60), st.integers(0, (1 << 32) - 1)),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: TEXTS,
}


@st.composite
def messages(draw: st.DrawFn, cls: Any) -> Any:
    """A message of this class with any of its fields set."""
    message = cls()
    for field in cls.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        element = NUMBERS[field.type] if field.message_type is None else messages(getattr(pb, field.message_type.name))
        target = getattr(message, field.name)
        if hasattr(target, "extend"):
            target.extend(draw(st.lists(element, max_size=6)))
        elif field.message_type is not None:
            target.CopyFrom(draw(element))
        else:
            setattr(message, field.name, draw(element))
    return message


@st.composite
def near_misses(draw: st.DrawFn) -> Any:
    """A request that would run but for a field or two."""
    request = ids_request(draw(st.lists(st.integers(0, 300), min_size=1, max_size=30)), max_tokens=draw(st.integers(1, 5)))
    request.sampling.MergeFrom(draw(messages(pb.SamplingParams)) if draw(st.booleans()) else pb.SamplingParams())
    return request


METHODS = {
    "Generate": st.one_of(messages(pb.GenerateRequest), near_misses()),
    "Tokenize": messages(pb.TokenizeRequest),
    "Detokenize": messages(pb.DetokenizeRequest),
    "Abort": messages(pb.AbortRequest),
}


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, bytes]:
    """A method and the bytes it is sent: a message as it is, with some bytes changed, cut off, or no message at all."""
    method = draw(st.sampled_from(["Generate", "Generate", "Generate", *METHODS]))
    payload = bytearray(draw(METHODS[method]).SerializeToString())
    kind = draw(st.sampled_from(["as it is", "as it is", "changed", "cut", "noise"]))
    if kind == "noise":
        return method, draw(st.binary(max_size=60))
    if kind == "cut":
        del payload[draw(st.integers(0, len(payload))) :]
    if kind == "changed" and payload:
        for _ in range(draw(st.integers(1, 4))):
            payload[draw(st.integers(0, len(payload) - 1))] = draw(st.integers(0, 255))
    return method, bytes(payload)


class Stage:
    """A front door over real parts, on a loop of its own, for tests that are driven from outside it."""

    def __init__(self, folder: Path, *engines: Any) -> None:
        self.thread = LoopThread("stage")
        self.engines = engines
        self._context = running(folder, list(engines))
        self.setup: Setup = self.do(self._context.__aenter__())

    def do(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return self.thread.run(work, timeout_s)

    def close(self) -> None:
        self.do(self._context.__aexit__(None, None, None))
        self.thread.close()

    async def witness(self) -> None:
        request = ids_request(WITNESS, max_tokens=NUM_WITNESS_TOKENS, ignore_eos=True)
        assert tokens_of(await self.setup.generate(request, timeout=30)) == expected(WITNESS, NUM_WITNESS_TOKENS)


@pytest.fixture(scope="module")
def stage(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder, RealEngine())
    yield stage
    stage.close()


def check_idle(stage: Stage) -> None:
    async def check() -> None:
        await eventually(stage.engines[0].is_idle)
        await eventually(lambda: len(stage.setup.door._live) == 0)
        stage.setup.check_idle()

    stage.do(check())
    assert stage.engines[0].engine.check() == []


def report(title: str, counts: Counter[Any]) -> None:
    print(f"\n{title}: {sum(counts.values())} sent; " + ", ".join(f"{count} {key}" for key, count in sorted(counts.items(), key=str)))


def test_any_call_is_answered(stage: Stage) -> None:
    counts: Counter[str] = Counter()

    async def call(method: str, payload: bytes) -> None:
        channel = stage.setup.channel
        make = channel.unary_stream if method == "Generate" else channel.unary_unary
        sent: Any = make(f"/{SERVICE}/{method}")(payload, timeout=5)
        with contextlib.suppress(grpc.aio.AioRpcError):
            if method == "Generate":
                events = [event async for event in sent]
                assert pb.GenerateEvent.FromString(events[-1]).HasField("finished")
            else:
                await sent
        code, details = await sent.code(), await sent.details()
        assert code.name in OWN_STATUSES, details
        assert code is not grpc.StatusCode.INVALID_ARGUMENT or NAMES_A_FIELD.match(details), details
        counts[f"{method} {code.name}"] += 1

    async def together(batch: list[tuple[str, bytes]]) -> None:
        await asyncio.gather(stage.witness(), *(call(method, payload) for method, payload in batch))

    @FUZZ
    @given(st.lists(calls(), min_size=1, max_size=6))
    def fuzz(batch: list[tuple[str, bytes]]) -> None:
        stage.do(together(batch))

    fuzz()
    report("calls", counts)
    assert {"Generate OK", "Generate INVALID_ARGUMENT", "Tokenize INVALID_ARGUMENT", "Detokenize OK"} <= set(counts)
    check_idle(stage)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(max_size=8), st.binary(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=8,
)
SUBMIT = Submit("r", b"\5\0\0\0\6\0\0\0", b"", list(SamplingSettings()), 3, [7], "", "", None)
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
