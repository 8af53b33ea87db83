from __future__ import annotations

import asyncio

import pytest

from cache_store.errors import MobulaError
from runtime.engine.frames import RequestOutput
from runtime.errors import Overloaded, ReplicaLost
from runtime.routing.output_queue import MAX_JOINED_TOKENS, OutputQueue, Turnstile


async def take(queue: OutputQueue) -> list[RequestOutput]:
    async with asyncio.timeout(5):
        return await queue.take(Turnstile())


async def test_a_late_reader_finds_everything_and_then_the_error() -> None:
    queue = OutputQueue(10)
    for token in range(3):
        queue.put(RequestOutput("x", [token]))
    queue.fail(ReplicaLost("gone"))
    queue.fail(MobulaError("only the first counts"))
    assert [output.token_ids for output in await take(queue)] == [[0, 1, 2]]
    with pytest.raises(ReplicaLost, match="gone"):
        await take(queue)


async def test_a_waiting_reader_is_woken() -> None:
    queue = OutputQueue(10)
    reader = asyncio.create_task(take(queue))
    await asyncio.sleep(0)
    queue.put(RequestOutput("x", [1]))
    assert [output.token_ids for output in await reader] == [[1]]
    reader = asyncio.create_task(take(queue))
    await asyncio.sleep(0)
    queue.fail(ReplicaLost("gone"))
    with pytest.raises(ReplicaLost):
        await reader


async def test_a_cancelled_reader_loses_nothing() -> None:
    queue = OutputQueue(10)
    reader = asyncio.create_task(take(queue))
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    queue.put(RequestOutput("x", [1]))
    assert len(await take(queue)) == 1


async def test_nothing_follows_the_last_output() -> None:
    queue = OutputQueue(10)
    queue.put(RequestOutput("x", [1], finish_reason="abort"))
    queue.put(RequestOutput("x", [2]))
    assert len(await take(queue)) == 1


async def test_more_tokens_than_asked_for_fail_the_request() -> None:
    queue = OutputQueue(2)
    queue.put(RequestOutput("x", [1, 2]))
    queue.put(RequestOutput("x", [3]))
    assert len(await take(queue)) == 1
    with pytest.raises(MobulaError, match="3 tokens"):
        await take(queue)


async def test_unread_tokens_are_joined_but_nothing_else_is() -> None:
    queue = OutputQueue(5000)
    queue.put(RequestOutput("x", [0], cached=[0, 0, 0, 0]))
    for token in range(1, 1000):
        queue.put(RequestOutput("x", [token]))
    queue.put(RequestOutput("x", [1000], [[(1000, -1.0)]]))
    queue.put(RequestOutput("x", [1001]))
    queue.put(RequestOutput("x", [1002], finish_reason="length", timings=[0.0, 0.0]))
    assert queue.num_unread == 1003 + 1
    outputs = await take(queue)
    assert [token for output in outputs for token in output.token_ids] == list(range(1003))
    assert max(len(output.token_ids) for output in outputs) <= MAX_JOINED_TOKENS
    assert len(outputs) == 1 + 1000 // MAX_JOINED_TOKENS + 3
    assert (outputs[0].cached, outputs[-3].logprobs, outputs[-1].finish_reason) == ([0, 0, 0, 0], [[(1000, -1.0)]], "length")
    assert queue.num_unread == 0


@pytest.mark.parametrize("size", [1, 22])
async def test_a_reader_that_falls_too_far_behind_loses_its_request(size: int) -> None:
    queue = OutputQueue(10_000, max_unread=100)
    scores = [[(1, -1.0)] * (size - 1)] if size > 1 else None
    for _ in range(100 // size):
        assert queue.put(RequestOutput("x", [1], scores))
    assert await take(queue)
    for _ in range(100 // size):
        assert queue.put(RequestOutput("x", [1], scores))
    assert not queue.put(RequestOutput("x", [1], scores))
    assert queue.num_unread == 0
    assert not queue.put(RequestOutput("x", [1], scores))
    with pytest.raises(Overloaded, match="reads too slowly"):
        await take(queue)


async def test_a_turnstile_lets_a_few_through_per_turn_in_order() -> None:
    turnstile = Turnstile(max_per_turn=3)
    passed: list[int] = []
    per_turn: list[int] = []

    async def enter(number: int) -> None:
        await turnstile.enter()
        passed.append(number)

    tasks = [asyncio.create_task(enter(number)) for number in range(20)]
    await asyncio.sleep(0)
    for cancelled in (5, 6, 11):
        tasks[cancelled].cancel()
    while not all(task.done() for task in tasks):
        before = len(passed)
        await asyncio.sleep(0)
        per_turn.append(len(passed) - before)
    assert passed == [number for number in range(20) if number not in (5, 6, 11)]
    assert max(per_turn) <= 3
    async with asyncio.timeout(5):
        await turnstile.enter()  # and it is free again


async def test_readers_without_a_token_go_first_and_make_turns_short() -> None:
    turnstile = Turnstile(max_per_turn=3, max_beside_new=1)
    passed: list[str] = []

    async def enter(name: str, *, is_new: bool) -> None:
        await turnstile.enter(is_new=is_new)
        passed.append(name)

    async def passed_in_a_turn() -> int:
        before = len(passed)
        await asyncio.sleep(0)
        return len(passed) - before

    others = [asyncio.create_task(enter(f"other {number}", is_new=False)) for number in range(12)]
    await asyncio.sleep(0)
    turnstile.num_new = 3  # one of which waits elsewhere
    new = [asyncio.create_task(enter(f"new {number}", is_new=True)) for number in range(2)]
    turns = [await passed_in_a_turn() for _ in range(8)]
    assert [name for name in passed if name.startswith("new")] == ["new 0", "new 1"]
    assert passed.index("new 1") < passed.index("other 5")
    assert max(turns[3:]) == 1
    turnstile.num_new = 0
    turns = [await passed_in_a_turn() for _ in range(6)]
    assert max(turns) == 3
    await asyncio.gather(*others, *new)
    assert [name for name in passed if name.startswith("other")] == [f"other {number}" for number in range(12)]
