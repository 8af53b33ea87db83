"""Calls that nobody would make, over real gRPC: every one ends with a status that names a field, and a witness that runs all the while gets
its own tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from runtime.frontdoor.service import SERVICE
from tests.runtime.frontdoor.conftest import ids_request
from tests.runtime.frontdoor.real_engine import RealEngine
from tests.runtime.frontdoor.stage import FUZZ, Stage, check_idle, report

OWN_STATUSES = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
NAMES_A_FIELD = re.compile(r"[a-z_]+(\[\d+\])?(\.[a-z_]+)*: ")

TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(["", "x" * 5000, "<s>", "\0", "\ud7ff\ue000", "user", "😀" * 300]))
NUMBERS = {
    FieldDescriptor.TYPE_FLOAT: st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, -1.0, 1e-45, 3e38, float("nan"), float("inf")])),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
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
    "ListPins": messages(pb.ListPinsRequest),
    "Unpin": messages(pb.UnpinRequest),
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


@pytest.fixture(scope="module")
def stage(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder, RealEngine())
    yield stage
    stage.close()


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
