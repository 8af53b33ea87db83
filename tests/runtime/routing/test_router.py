"""The router over a real engine channel: reservations end with their requests, however those end."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from runtime.engine.frames import Load, RequestOutput, Submit
from runtime.errors import DeadlinePassed, NoReplica, Overloaded, ReplicaLost, SuspectRequest
from runtime.request import StopConditions, ValidRequest
from runtime.routing.engine_channel import ChannelSettings
from runtime.routing.policies import make_policy
from runtime.routing.router import Router
from runtime.routing.types import Membership, ReplicaMember
from tests.runtime.frontdoor.fake_engine import FakeEngine, eventually, tokens_plan
from workers.step import SamplingSettings


def a_request(request_id: str = "x", num_prompt: int = 40, max_tokens: int = 5, deadline_s: float | None = None) -> ValidRequest:
    prompt = array("I", range(num_prompt))
    return ValidRequest(request_id, prompt, SamplingSettings(), StopConditions(max_tokens, frozenset()), deadline_s=deadline_s)


def members(version: int, *engines: FakeEngine) -> Membership:
    return Membership(version, tuple(ReplicaMember(engine.hello.replica_id, f"127.0.0.1:{engine.port}", "ready") for engine in engines))


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine()
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def router(engine: FakeEngine) -> AsyncIterator[Router]:
    router = Router(make_policy("prefix_affinity"), ChannelSettings(heartbeat_s=0.1, silence_limit_s=2.0))
    await router.set_membership(members(1, engine))
    await eventually(lambda: router.is_serving(60))
    yield router
    await router.close()


async def read(router: Router, request: ValidRequest) -> list[int]:
    async with asyncio.timeout(10):
        return [
            token
            for batch in [batch async for batch in router.dispatch(request).outputs()]
            for output in batch
            for token in output.token_ids
        ]


async def test_outputs_come_back_and_the_reservation_ends(router: Router, engine: FakeEngine) -> None:
    engine.running.clear()
    reading = asyncio.create_task(read(router, a_request()))
    await eventually(lambda: engine.submitted)
    assert router.reserved() == {"r0": (1, 40)}
    engine.running.set()
    assert await reading == [1] * 5
    assert router.reserved() == {"r0": (0, 0)}


async def test_a_prompt_counts_only_until_its_first_token(router: Router, engine: FakeEngine) -> None:
    engine.step_s = 0.01
    async with aclosing(router.dispatch(a_request(max_tokens=100)).outputs()) as batches:
        await anext(batches)
        assert router.reserved() == {"r0": (1, 0)}
    assert router.reserved() == {"r0": (0, 0)}
    assert (await eventually(lambda: engine.aborted))[0].reason == "abort"


async def test_the_second_of_two_equal_prompts_reserves_its_tail_only(router: Router, engine: FakeEngine) -> None:
    await read(router, a_request())
    engine.running.clear()
    reading = asyncio.create_task(read(router, a_request()))
    await eventually(lambda: len(engine.submitted) == 2)
    assert router.reserved() == {"r0": (1, 40 - 32)}
    engine.running.set()
    await reading


async def test_the_deadline_fails_the_request_here_too(router: Router, engine: FakeEngine) -> None:
    engine.running.clear()
    with pytest.raises(DeadlinePassed):
        await read(router, a_request(deadline_s=asyncio.get_running_loop().time() + 0.05))
    assert (await eventually(lambda: engine.aborted))[0].reason == "deadline"
    assert router.reserved() == {"r0": (0, 0)}


async def test_without_a_ready_replica_the_reason_is_given(router: Router, engine: FakeEngine) -> None:
    await router.set_membership(Membership(2, (ReplicaMember("r7", "", "loading", "weights 1 of 2"),)))
    with pytest.raises(NoReplica, match=r"r7 is loading \(weights 1 of 2\)"):
        await read(router, a_request())
    await router.set_membership(members(1, engine))  # older: ignored
    assert router.membership.version == 2


async def test_a_replica_that_leaves_fails_its_requests(router: Router, engine: FakeEngine) -> None:
    engine.running.clear()
    reading = asyncio.create_task(read(router, a_request()))
    await eventually(lambda: engine.submitted)
    await router.set_membership(Membership(2))
    with pytest.raises(ReplicaLost):
        await reading
    assert router.reserved() == {}


async def test_a_restarted_engine_is_found_again(router: Router, engine: FakeEngine) -> None:
    assert await read(router, a_request()) == [1] * 5
    await engine.stop()
    await eventually(lambda: not router.is_serving(60))
    engine.hello = engine.hello._replace(incarnation="second")
    await engine.start(engine.port)
    await eventually(lambda: router.is_serving(60))
    engine.running.clear()
    reading = asyncio.create_task(read(router, a_request()))
    await eventually(lambda: len(engine.submitted) == 2)
    assert router.reserved() == {"r0": (1, 40)}  # what the first incarnation held is gone
    engine.running.set()
    await reading


async def test_late_outputs_of_an_old_request_do_not_reach_a_new_one_of_the_same_id(router: Router, engine: FakeEngine) -> None:
    engine.step_s = 0.005
    async with aclosing(router.dispatch(a_request("same", max_tokens=100)).outputs()) as batches:
        await anext(batches)
    engine.plan = tokens_plan([7])
    assert await read(router, a_request("same")) == [7] * 5
    assert len({submit.request_id for submit in engine.submitted}) == 2


@pytest.fixture
async def two(engine: FakeEngine) -> AsyncIterator[tuple[Router, FakeEngine, FakeEngine]]:
    """A router with two engines that count up; requests go to the first."""
    words = list(range(10, 400))
    first, second = engine, FakeEngine("r1", tokens_plan(words))
    first.plan, first.step_s, second.step_s = tokens_plan(words), 0.005, 0.005
    await second.start()
    router = Router(make_policy("least_loaded"), ChannelSettings(heartbeat_s=0.1, silence_limit_s=2.0))
    await router.set_membership(members(1, first, second))
    await eventually(lambda: len(router._ready()) == 2)
    yield router, first, second
    await router.close()
    await second.stop()


async def read_and_break(router: Router, request: ValidRequest, *engines: FakeEngine) -> list[int]:
    """Ends the engines, one after the other, each once some of its tokens have come."""
    tokens: list[int] = []
    breaks = list(engines)
    num_before = 0
    async with asyncio.timeout(10), aclosing(router.dispatch(request).outputs()) as batches:
        async for batch in batches:
            tokens += [token for output in batch for token in output.token_ids]
            if breaks and len(tokens) >= num_before + 3:
                num_before = len(tokens)
                await breaks.pop(0).stop()
    return tokens


async def test_a_request_goes_on_with_its_output_where_its_replica_dies(two: tuple[Router, FakeEngine, FakeEngine]) -> None:
    router, first, second = two
    now_s = asyncio.get_running_loop().time()
    request = dataclasses.replace(a_request(max_tokens=30, deadline_s=now_s + 60), sampling=SamplingSettings(seed=7))
    assert await read_and_break(router, request, first) == list(range(10, 40))
    [submit] = second.submitted
    brought = array("I", submit.output)
    assert list(brought) == list(range(10, 10 + len(brought)))
    assert len(brought) >= 3
    assert submit.prompt == request.prompt_token_ids.tobytes()
    assert (submit.max_tokens, submit.sampling) == (30, list(request.sampling)), "limits and draws count from the first token"
    assert submit.timeout_s is not None
    assert submit.timeout_s < 60
    assert router.reserved() == {"r0": (0, 0), "r1": (0, 0)}


async def comes_with_other_weights(router: Router, engine: FakeEngine) -> None:
    await engine.stop()
    engine.hello = engine.hello._replace(weights_digest=b"other weights...")
    await engine.start(engine.port)
    await eventually(lambda: [hello.weights_digest for _, hello in router._ready()] == [b"w" * 16, b"other weights..."])


async def test_a_request_that_has_begun_goes_on_with_the_same_weights_only(two: tuple[Router, FakeEngine, FakeEngine]) -> None:
    router, first, second = two
    await comes_with_other_weights(router, second)
    with pytest.raises(ReplicaLost):
        await read_and_break(router, a_request(max_tokens=30), first)
    assert second.submitted == []


async def test_a_request_of_which_no_token_has_come_goes_on_with_any_weights(two: tuple[Router, FakeEngine, FakeEngine]) -> None:
    router, first, second = two
    await comes_with_other_weights(router, second)
    plan, first.step_s = first.plan, 60.0
    first.plan = lambda submit: [RequestOutput(submit.request_id, [], cached=[16, 0, 0, 0]), *plan(submit)]
    tokens: list[int] = []
    async with asyncio.timeout(10), aclosing(router.dispatch(a_request(max_tokens=5)).outputs()) as batches:
        [told] = await anext(batches)
        assert (told.token_ids, told.cached) == ([], [16, 0, 0, 0])
        await first.stop()
        async for batch in batches:
            tokens += [token for output in batch for token in output.token_ids]
    assert tokens == list(range(10, 15))
    assert second.submitted[0].output == b""


async def test_an_engine_may_say_later_what_its_weights_are(router: Router, engine: FakeEngine) -> None:
    engine.hello = engine.hello._replace(weights_digest=b"known by now....")
    engine.news.append(engine.hello)
    channel = router.channel("r0")
    assert channel is not None
    await eventually(lambda: channel.hello == engine.hello)
    assert await read(router, a_request()) == [1] * 5


async def test_prompt_positions_that_were_scored_are_not_scored_again(two: tuple[Router, FakeEngine, FakeEngine]) -> None:
    router, first, second = two

    def plan(submit: Submit) -> list[RequestOutput]:
        scores = [[(1, -1.0)]] * 8
        outputs = [RequestOutput(submit.request_id, [], prompt_logprobs=scores) for _ in range(4)]
        return [*outputs, RequestOutput(submit.request_id, [5], prompt_logprobs=scores[:7], finish_reason="length", timings=[0, 0])]

    first.plan = plan
    request = dataclasses.replace(a_request(max_tokens=1), sampling=SamplingSettings(num_prompt_logprobs=0))
    async with asyncio.timeout(10), aclosing(router.dispatch(request).outputs()) as batches:
        num_scored = 0
        async for batch in batches:
            num_scored += sum(len(output.prompt_logprobs or []) for output in batch)
            if second.submitted:
                break
            await first.stop()
    [submit] = second.submitted
    assert SamplingSettings(*submit.sampling).prompt_logprobs_start == 1 + num_scored
    assert 0 < num_scored < 39


async def test_a_request_that_two_replicas_die_of_is_refused_for_a_while(
    two: tuple[Router, FakeEngine, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    router, first, second = two
    third = FakeEngine("r2")
    await third.start()
    await router.set_membership(members(2, first, second, third))
    await eventually(lambda: len(router._ready()) == 3)
    third.load = Load(50, 0, 0)  # so that the others are chosen before it
    await eventually(lambda: router.channel("r2").load.num_running == 50)  # type: ignore[union-attr]
    with pytest.raises(SuspectRequest):
        await read_and_break(router, a_request(max_tokens=100), first, second)
    assert third.submitted == []
    with pytest.raises(SuspectRequest, match="refused for 60 s"):
        await read(router, a_request("again", max_tokens=100))
    assert await read(router, a_request("another", num_prompt=39)) == [1] * 5
    monkeypatch.setattr(router.suspects, "_clock", lambda: time.monotonic() + 60.0)
    assert await read(router, a_request("later")) == [1] * 5
    await third.stop()


async def test_reservations_are_zero_after_any_ending(router: Router, engine: FakeEngine) -> None:
    """Many requests at once, each ended in a way of its own; then nothing is left here or at the engine."""
    draw = random.Random(11)
    engine.step_s = 0.001

    def plan(submit: Submit) -> list[RequestOutput]:
        outputs = tokens_plan()(submit)
        if submit.request_id.startswith("error"):
            outputs[len(outputs) // 2 :] = [RequestOutput(submit.request_id, [], error=["Overloaded", "full"])]
        return outputs

    errors: list[tuple[str, type]] = []

    async def one(number: int) -> None:
        ending = draw.choice(["read", "error", "leave", "cancel", "abort", "stop", "deadline"])
        now_s = asyncio.get_running_loop().time()
        request = a_request(
            f"{ending}-{number}", draw.randrange(1, 100), draw.randrange(1, 60), now_s + 0.02 if ending == "deadline" else None
        )
        if ending == "cancel":
            task = asyncio.create_task(read(router, request))
            await asyncio.sleep(draw.random() * 0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return
        dispatch = router.dispatch(request)
        num_batches = 0
        try:
            async with aclosing(dispatch.outputs()) as batches:
                async for _ in batches:
                    num_batches += 1
                    if ending == "leave" and num_batches == 3:
                        return
                    if ending == "abort" and num_batches == 2:
                        dispatch.abort()
                    if ending == "stop" and num_batches == 2:
                        dispatch.stop_matched(2)
                        return
        except (Overloaded, DeadlinePassed) as error:
            errors.append((ending, type(error)))

    engine.plan = plan
    async with asyncio.timeout(30):
        await asyncio.gather(*(one(number) for number in range(150)))
    assert set(errors) == {("error", Overloaded), ("deadline", DeadlinePassed)}
    assert router.reserved() == {"r0": (0, 0)}
    channel = router.channel("r0")
    assert channel is not None
    assert channel.num_live == 0
    assert (await channel.status(5.0)).stats.num_running == 0  # aborts were sent before this question
