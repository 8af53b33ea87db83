"""Input that is answered before or beside validation: bytes that are no message, passed deadlines, messages that are too large."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from protos import inference_pb2 as pb
from runtime.frontdoor.malformed import describe_malformed
from runtime.frontdoor.service import SERVICE
from runtime.text.tokenizer import Tokenizer
from tests.runtime.frontdoor.conftest import Setup, ids_request, status_of, tokens_of
from tests.runtime.frontdoor.fake_engine import FakeEngine, eventually

MARK = "@@"


def with_bad_text(message: Message) -> bytes:
    """The message's bytes with MARK replaced by two bytes that are not UTF-8."""
    payload = message.SerializeToString()
    assert MARK.encode() in payload
    return payload.replace(MARK.encode(), b"\xff\xfe")


def chat(role: str, content: str) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role=role, content=content)])


BAD_TEXT = [
    ("Generate", "text", pb.GenerateRequest(text=MARK)),
    ("Generate", "request_id", pb.GenerateRequest(request_id=MARK, text="x")),
    ("Generate", "model", pb.GenerateRequest(model=MARK)),
    ("Generate", "cache_salt", pb.GenerateRequest(cache_salt=MARK)),
    ("Generate", "sampling.stop", pb.GenerateRequest(sampling=pb.SamplingParams(stop=["fine", MARK]))),
    ("Generate", "messages.messages.role", pb.GenerateRequest(messages=chat(MARK, "x"))),
    ("Generate", "messages.messages.content", pb.GenerateRequest(messages=chat("user", MARK))),
    ("Generate", "messages.tools_json", pb.GenerateRequest(messages=pb.ChatMessages(tools_json=MARK))),
    ("Tokenize", "text", pb.TokenizeRequest(text=MARK)),
    ("Tokenize", "model", pb.TokenizeRequest(model=MARK)),
    ("Detokenize", "model", pb.DetokenizeRequest(model=MARK)),
    ("Abort", "request_id", pb.AbortRequest(request_id=MARK)),
    ("Unpin", "pin_ids", pb.UnpinRequest(pin_ids=[MARK])),
]


def raw_call(setup: Setup, method: str, payload: bytes) -> Any:
    make = setup.channel.unary_stream if method == "Generate" else setup.channel.unary_unary
    call: Any = make(f"/{SERVICE}/{method}")(payload, timeout=5)
    return call


@pytest.mark.parametrize(("method", "field", "message"), BAD_TEXT, ids=[f"{method}-{field}" for method, field, _ in BAD_TEXT])
async def test_text_that_is_not_utf8_names_its_field(one: Setup, method: str, field: str, message: Message) -> None:
    error = await status_of(raw_call(one, method, with_bad_text(message)))
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, f"{field}: is not valid UTF-8")
    sample = one.door.metrics.registry.get_sample_value
    assert sample("mobula:rpc_failures_total", {"method": method, "reason": "bad_request"}) == 1
    assert tokens_of(await one.generate(ids_request([5], max_tokens=2, ignore_eos=True))) == [1, 1]


async def test_bytes_that_are_no_message_are_said_to_be_none(one: Setup) -> None:
    for payload in (b"\xff", b"\x1a\x7f", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"):
        error = await status_of(raw_call(one, "Generate", payload))
        assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "request: is not a GenerateRequest message")
    assert describe_malformed(b"\xff", pb.AbortRequest) == "request: is not a AbortRequest message"


async def test_a_passed_deadline_is_answered_as_such(one: Setup) -> None:
    error = await status_of(one.stub.Generate(ids_request([5], max_tokens=1), timeout=0))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    one.engines[0].running.clear()
    error = await status_of(one.stub.Generate(ids_request([5], max_tokens=1), timeout=0.05))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    sample = one.door.metrics.registry.get_sample_value
    await eventually(lambda: (sample("mobula:requests_total", {"status": "deadline"}) or 0) >= 1)


async def test_an_oversized_message_disturbs_nobody(run_engines: Callable[..., Any]) -> None:
    async with run_engines(FakeEngine(step_s=0.002), max_message_bytes=50_000) as setup:
        running = aiter(setup.stub.Generate(ids_request([5], max_tokens=200, ignore_eos=True), timeout=10))
        await anext(running)
        for request in (
            pb.GenerateRequest(text="x" * 60_000),
            ids_request([5] * 60_000),
            pb.GenerateRequest(messages=chat("user", "x" * 60_000)),
        ):
            assert (await status_of(setup.stub.Generate(request, timeout=5))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(tokens_of([event async for event in running])) == 200
        setup.check_idle()


async def test_calls_that_wait_for_the_tokenizer_are_bounded(run_engines: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tokenizer held, one call more than may wait is refused; those that wait are answered afterwards."""
    async with run_engines(FakeEngine(), max_live_requests=3) as setup:
        released, encode = threading.Event(), Tokenizer.encode

        def slow(self: Tokenizer, text: str, *, add_special_tokens: bool) -> Any:
            assert released.wait(10)
            return encode(self, text, add_special_tokens=add_special_tokens)

        monkeypatch.setattr(Tokenizer, "encode", slow)
        calls = [setup.stub.Tokenize(pb.TokenizeRequest(text="fox " * 1000), timeout=10) for _ in range(3)]
        await eventually(lambda: setup.door._live._num_visits == 3)
        error = await status_of(setup.stub.Tokenize(pb.TokenizeRequest(text="fox " * 1000), timeout=5))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
        released.set()
        answers = [await call for call in calls]
        assert {len(answer.token_ids) for answer in answers} == {len(answers[0].token_ids)}
        text = await setup.stub.Detokenize(pb.DetokenizeRequest(token_ids=list(answers[0].token_ids) * 2), timeout=5)
        assert text.text == "fox " * 2000


async def test_several_names_are_listed_and_served(run_engines: Callable[..., Any]) -> None:
    async with run_engines(FakeEngine(), model_names=("tiny", "tiny-latest")) as setup:
        cards = (await setup.stub.ListModels(pb.ListModelsRequest(), timeout=5)).models
        assert [card.name for card in cards] == ["tiny", "tiny-latest"]
        assert len({(card.architecture, card.vocab_size, card.takes_chat) for card in cards}) == 1
        for name in ("", "tiny", "tiny-latest"):
            request = ids_request([5], max_tokens=1)
            request.model = name
            assert (await setup.generate(request))[-1].HasField("finished")
            assert (await setup.stub.Tokenize(pb.TokenizeRequest(model=name, text="x"), timeout=5)).token_ids
            assert (await setup.stub.Detokenize(pb.DetokenizeRequest(model=name, token_ids=[260]), timeout=5)).text
        for call in (
            setup.stub.Generate(pb.GenerateRequest(model="other", text="x"), timeout=5),
            setup.stub.Tokenize(pb.TokenizeRequest(model="other", text="x"), timeout=5),
            setup.stub.Detokenize(pb.DetokenizeRequest(model="other", token_ids=[5]), timeout=5),
        ):
            error = await status_of(call)
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert "'tiny', 'tiny-latest'" in error.details()
