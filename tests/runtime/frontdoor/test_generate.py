from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from runtime.client import describe_usage
from runtime.engine.frames import RequestOutput, Submit
from runtime.text.tokenizer import Tokenizer
from tests.runtime.frontdoor.conftest import Setup, ids_request, status_of, text_of, tokens_of
from tests.runtime.frontdoor.fake_engine import FakeEngine, eventually, tokens_plan


def prompt_of(submit: Submit) -> list[int]:
    return [int.from_bytes(submit.prompt[at : at + 4], "little") for at in range(0, len(submit.prompt), 4)]


async def test_token_ids_stream_back_with_usage(one: Setup) -> None:
    one.engines[0].plan = tokens_plan([40, 41, 42], cached=(16, 0, 32, 0))
    events = await one.generate(ids_request(list(range(10, 80)), max_tokens=5, ignore_eos=True))
    assert events[0].started.num_prompt_tokens == 70
    assert events[0].started.num_cached_tokens == 48
    assert events[0].started.replica_id == "r0"
    assert events[0].started.request_id
    assert tokens_of(events) == [40, 41, 42, 40, 41]
    finished = events[-1].finished
    assert finished.reason == pb.LENGTH
    assert finished.usage.num_completion_tokens == 5
    assert dict(finished.usage.cached_tokens_by_tier) == {"pages": 16, "dram": 0, "disk": 32, "peer": 0}
    assert finished.usage.num_cached_tokens == 48
    assert (finished.usage.num_computed_tokens, finished.usage.bytes_loaded) == (22, 4096)
    assert dict(finished.usage.not_reused_tokens_by_reason) == {"cold": 22}
    assert describe_usage(finished.usage) == {
        "prompt_tokens": 70,
        "completion_tokens": 5,
        "cached_tokens": 48,
        "cached_tokens_by_tier": {"pages": 16, "dram": 0, "disk": 32, "peer": 0},
        "computed_tokens": 22,
        "bytes_loaded": 4096,
        "not_reused_tokens_by_reason": {"cold": 22},
    }
    assert (finished.timings.queue_s, finished.timings.store_wait_s) == (0.25, 0.125)
    assert 0 < finished.timings.ttft_s <= finished.timings.total_s
    assert prompt_of(one.engines[0].submitted[0]) == list(range(10, 80))
    sample = one.door.metrics.registry.get_sample_value
    await eventually(lambda: sample("mobula:requests_total", {"status": "length"}) == 1)
    assert (sample("mobula:prompt_tokens_total"), sample("mobula:generation_tokens_total")) == (70, 5)
    assert sample("mobula:prompt_tokens_cached_total", {"tier": "disk"}) == 32
    assert sample("mobula:time_to_first_token_seconds_count") == 1
    assert b"mobula:inter_token_latency_seconds_bucket" in one.door.metrics.render()


async def test_text_and_chat_reach_the_engine_as_the_model_expects(one: Setup, tokenizer: Tokenizer) -> None:
    one.engines[0].plan = tokens_plan(list(tokenizer.encode("over the dog", add_special_tokens=False)) + [1])
    events = await one.generate(pb.GenerateRequest(text="the quick"))
    assert text_of(events) == "over the dog"
    assert events[-1].finished.reason == pb.STOP
    assert tokens_of(events)[-1] == 1  # eos is part of the output
    messages = [pb.ChatMessage(role="system", content="be brief"), pb.ChatMessage(role="user", content="hi")]
    await one.generate(pb.GenerateRequest(messages=pb.ChatMessages(messages=messages)))
    plain, chat = (prompt_of(submit) for submit in one.engines[0].submitted)
    assert plain == [0, *tokenizer.encode("the quick", add_special_tokens=False)]
    wanted = "<s><|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat == list(tokenizer.encode(wanted, add_special_tokens=False))


async def test_characters_split_over_tokens_stay_whole(one: Setup, tokenizer: Tokenizer) -> None:
    text = "fox 😀 é 漢字 dog"
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    assert len(ids) > len(text)
    one.engines[0].plan, one.engines[0].step_s = tokens_plan(ids), 0.001
    events = await one.generate(ids_request([5], max_tokens=len(ids)))
    assert text_of(events) == text
    assert not any("\ufffd" in event.tokens.text for event in events)
    assert tokens_of(events) == ids


async def test_an_unfinished_character_at_the_end_is_shown_as_replaced(one: Setup, tokenizer: Tokenizer) -> None:
    ids = list(tokenizer.encode("a😀", add_special_tokens=False))[:-1]
    one.engines[0].plan = tokens_plan(ids)
    events = await one.generate(ids_request([5], max_tokens=len(ids)))
    assert text_of(events) == "a\ufffd" == tokenizer.decode(ids)


@pytest.mark.parametrize("tokens_per_step", [1, 4, 100])
async def test_stop_string_over_token_boundaries(one: Setup, tokenizer: Tokenizer, tokens_per_step: int) -> None:
    ids = list(tokenizer.encode("the fox😀 jumps over the lazy dog", add_special_tokens=False))
    before = next(count for count in range(len(ids)) if "jumps o" in tokenizer.decode(ids[:count]))
    one.engines[0].plan, one.engines[0].step_s = tokens_plan(ids, tokens_per_step=tokens_per_step), 0.02
    events = await one.generate(ids_request([5], max_tokens=400, stop=["zebra", "jumps o", "over"]))
    assert text_of(events) == "the fox😀 "
    finished = events[-1].finished
    assert (finished.reason, finished.stop_match) == (pb.STOP, "jumps o")
    assert finished.usage.num_completion_tokens == before == len(tokens_of(events))
    abort = (await eventually(lambda: one.engines[0].aborted))[0]
    assert (abort.reason, abort.num_output_tokens) == ("stop", before)


async def test_text_held_for_a_stop_string_that_never_comes_is_sent_at_the_end(one: Setup, tokenizer: Tokenizer) -> None:
    ids = list(tokenizer.encode("over the do", add_special_tokens=False))
    one.engines[0].plan = tokens_plan(ids)
    events = await one.generate(ids_request([5], max_tokens=len(ids), stop=["dog"]))
    assert text_of(events) == "over the do"
    assert events[-1].finished.reason == pb.LENGTH


async def test_logprobs(one: Setup) -> None:
    def plan(submit: Submit) -> list[RequestOutput]:
        prompt = [[(position, -1.0), (9, -2.0)] for position in range(1, 700)]
        return [
            RequestOutput(submit.request_id, [], prompt_logprobs=prompt[:300], cached=[0, 0, 0, 0]),
            RequestOutput(submit.request_id, [7], [[(7, -0.5), (8, -1.5)]], prompt[300:]),
            RequestOutput(submit.request_id, [9], [[(9, -0.25), (7, -3.0)]], finish_reason="length", timings=[0, 0]),
        ]

    one.engines[0].plan = plan
    events = await one.generate(ids_request([5] * 20, max_tokens=2, logprobs=1, prompt_logprobs=1))
    tokens = [event.tokens for event in events]
    positions = [entry.entries[0].token_id for event in tokens for entry in event.prompt_logprobs]
    assert positions == list(range(1, 700))
    assert max(len(event.prompt_logprobs) for event in tokens) <= 256
    chosen = [(entry.entries[0].token_id, entry.entries[0].logprob) for event in tokens for entry in event.logprobs]
    assert chosen == [(7, -0.5), (9, -0.25)]
    assert one.engines[0].submitted[0].sampling[8:10] == [1, 1]


async def test_events_carry_one_token_unless_the_reader_is_behind(one: Setup) -> None:
    one.engines[0].step_s = 0.01
    events = await one.generate(ids_request([5], max_tokens=20, ignore_eos=True))
    sizes = [len(event.tokens.token_ids) for event in events[1:-1]]
    assert sum(sizes) == 20
    assert sizes.count(1) >= 18  # a stall of this machine may join two


async def test_a_slow_reader_does_not_stall_others(one: Setup) -> None:
    plain = tokens_plan([40])

    def plan(submit: Submit) -> list[RequestOutput]:  # about 300 bytes a token: more than the client's window takes unread
        best = [[(token_id, -1.0) for token_id in range(21)]]
        return [output._replace(logprobs=best) if submit.sampling[8] else output for output in plain(submit)]

    one.engines[0].plan = plan
    small_window = [("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(one.address, options=small_window) as channel:
        slow = rpc.InferenceStub(channel).Generate(ids_request([5], max_tokens=500, ignore_eos=True, logprobs=20), timeout=20)
        unread = aiter(slow)
        await anext(unread)
        for _ in range(3):
            async with asyncio.timeout(5):
                events = await one.generate(ids_request([6], max_tokens=400, ignore_eos=True))
            assert len(tokens_of(events)) == 400
        sizes = [len(event.tokens.token_ids) async for event in unread]
    assert sum(sizes) == 500
    assert max(sizes) > 1  # what came meanwhile shares events


async def test_a_client_that_leaves_is_aborted_at_the_engine(one: Setup) -> None:
    one.engines[0].step_s = 0.005
    call = one.stub.Generate(ids_request([5], max_tokens=400, ignore_eos=True))
    await anext(aiter(call))
    call.cancel()
    abort = (await eventually(lambda: one.engines[0].aborted))[0]
    assert abort.reason == "abort"
    assert one.door.metrics.registry.get_sample_value("mobula:requests_total", {"status": "cancelled"}) == 1


async def test_abort_ends_the_stream_and_reaches_the_engine(one: Setup) -> None:
    one.engines[0].step_s = 0.005
    request = ids_request([5], max_tokens=400, ignore_eos=True)
    request.request_id = "mine"
    call = one.stub.Generate(request, timeout=10)
    unread = aiter(call)
    events = [await anext(unread), await anext(unread)]
    answer = await one.stub.Abort(pb.AbortRequest(request_id="mine"), timeout=5)
    assert answer.outcome == pb.ABORTED
    events += [event async for event in unread]
    assert events[-1].finished.reason == pb.ABORT
    assert events[-1].finished.usage.num_completion_tokens == len(tokens_of(events)) < 400
    assert (await eventually(lambda: one.engines[0].aborted))[0].reason == "abort"
    again = await one.stub.Abort(pb.AbortRequest(request_id="mine"), timeout=5)
    assert again.outcome == pb.UNKNOWN_REQUEST


async def test_an_abort_before_the_first_output_is_answered_in_order(one: Setup) -> None:
    one.engines[0].running.clear()
    request = ids_request([5], max_tokens=4)
    request.request_id = "early"
    call = one.stub.Generate(request, timeout=10)
    await eventually(lambda: one.engines[0].submitted)
    await one.stub.Abort(pb.AbortRequest(request_id="early"), timeout=5)
    kinds = [event.WhichOneof("event") async for event in call]
    assert kinds == ["started", "finished"]


async def test_the_deadline_travels_to_the_engine_and_ends_the_request(one: Setup) -> None:
    one.engines[0].running.clear()
    call = one.stub.Generate(ids_request([5], max_tokens=4), timeout=0.3)
    error = await status_of(call)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < one.engines[0].submitted[0].timeout_s < 0.4  # gRPC rounds up on the wire
    assert await eventually(lambda: one.engines[0].aborted)


async def test_a_live_request_id_is_not_given_away(one: Setup) -> None:
    one.engines[0].running.clear()
    request = ids_request([5], max_tokens=1)
    request.request_id = "twin"
    first = one.stub.Generate(request, timeout=10)
    await eventually(lambda: one.engines[0].submitted)
    error = await status_of(one.stub.Generate(request, timeout=5))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    assert "twin" in error.details()
    one.engines[0].running.set()
    assert [event async for event in first][-1].finished.reason == pb.STOP
    assert (await one.generate(request))[-1].finished.reason == pb.STOP


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (["Overloaded", "queue full"], grpc.StatusCode.RESOURCE_EXHAUSTED),
        (["BadRequest", "max_tokens: no"], grpc.StatusCode.INVALID_ARGUMENT),
        (["GroupFailed", "rank 1 died"], grpc.StatusCode.UNAVAILABLE),
        (["SomethingNew", "who knows"], grpc.StatusCode.INTERNAL),
    ],
)
async def test_an_engine_error_becomes_a_status(one: Setup, error: list[str], code: grpc.StatusCode) -> None:
    one.engines[0].plan = lambda submit: [RequestOutput(submit.request_id, [], error=error)]
    failure = await status_of(one.stub.Generate(ids_request([5], max_tokens=1), timeout=5))
    assert (failure.code(), failure.details()) == (code, error[1])
    pushback = dict(failure.trailing_metadata()).get("grpc-retry-pushback-ms")
    assert (pushback is not None) == (code is grpc.StatusCode.RESOURCE_EXHAUSTED)


async def test_too_many_requests_are_refused_with_a_hint(run_engines: Callable[..., Any]) -> None:
    engine = FakeEngine()
    engine.running.clear()
    async with run_engines(engine, max_live_requests=2) as setup:
        calls = [setup.stub.Generate(ids_request([5], max_tokens=1), timeout=10) for _ in range(2)]
        await eventually(lambda: len(engine.submitted) == 2)
        error = await status_of(setup.stub.Generate(ids_request([5], max_tokens=1), timeout=5))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        engine.running.set()
        for call in calls:
            assert [event async for event in call][-1].HasField("finished")
        setup.check_idle()


async def test_full_prompt_queues_are_refused_with_a_hint(run_engines: Callable[..., Any]) -> None:
    engine = FakeEngine(max_queued_tokens=100)
    engine.running.clear()
    async with run_engines(engine) as setup:
        first = setup.stub.Generate(ids_request([5] * 90, max_tokens=1), timeout=10)
        await eventually(lambda: engine.submitted)
        error = await status_of(setup.stub.Generate(ids_request([6] * 90, max_tokens=1), timeout=5))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
        engine.running.set()
        assert [event async for event in first][-1].HasField("finished")
        assert (await setup.generate(ids_request([6] * 90, max_tokens=1)))[-1].HasField("finished")


async def test_sampling_settings_reach_the_engine(one: Setup) -> None:
    await one.generate(ids_request([5], max_tokens=1, temperature=0.5, top_k=3, top_p=0.75, seed=-1, stop_token_ids=[9], min_p=0.25))
    drawn = await one.generate(ids_request([5], max_tokens=1, ignore_eos=True))
    stated, default = one.engines[0].submitted
    assert stated.sampling[3:8] == [0.5, 0.25, 3, 0.75, 2**64 - 1]
    assert sorted(stated.end_token_ids) == [1, 9]
    assert default.sampling[3:7] == [1.0, 0.0, 0, 1.0]
    assert default.end_token_ids == []
    assert default.sampling[7] != stated.sampling[7]
    assert drawn[-1].HasField("finished")
    assert default.tenant == ""
