"""The stream that a client's calls share, between a real client and a server whose answers the test holds back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from cache_store import calls
from cache_store.calls import CallStream, serve_calls
from cache_store.client import StoreClient
from cache_store.errors import StoreRefused, StoreUnavailable
from protos import cache_store_pb2 as pb
from protos import cache_store_pb2_grpc


class Holding(cache_store_pb2_grpc.CacheStoreServicer):
    """Answers a release of lease n with n, once `let_go(n)` has been called or `holds` is off."""

    def __init__(self) -> None:
        self.holds = False
        self.begun: list[int] = []
        self._gates: dict[int, asyncio.Event] = {}
        self.num_streams = 0

    def let_go(self, number: int) -> None:
        self._gates.setdefault(number, asyncio.Event()).set()

    async def Calls(self, requests: object, context: Any) -> None:  # noqa: N802
        self.num_streams += 1
        await serve_calls(self._answer, context)

    async def _answer(self, call: pb.Call) -> pb.Answer:
        number = call.release.lease_ids[0]
        self.begun.append(number)
        if self.holds:
            await self._gates.setdefault(number, asyncio.Event()).wait()
        return pb.Answer(number=call.number, release=pb.ReleaseResponse(num_released=number))


@contextlib.asynccontextmanager
async def serving(service: Holding, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    cache_store_pb2_grpc.add_CacheStoreServicer_to_server(service, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def streaming(address: str) -> AsyncIterator[Callable[[int], Awaitable[int]]]:
    """What releases a lease over one CallStream."""
    async with grpc.aio.insecure_channel(address, options=[("grpc.initial_reconnect_backoff_ms", 50)]) as channel:
        stream = CallStream(cache_store_pb2_grpc.CacheStoreStub(channel).Calls)

        async def release(number: int) -> int:
            answer = await asyncio.wait_for(stream.ask("release", pb.ReleaseRequest(lease_ids=[number])), 10.0)
            return answer.release.num_released

        try:
            yield release
        finally:
            await stream.close()


async def begun(service: Holding, count: int) -> None:
    async with asyncio.timeout(10.0):
        while len(service.begun) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_answers_come_as_they_are_ready() -> None:
    service = Holding()
    service.holds = True
    async with serving(service) as address, streaming(address) as release:
        waiting = [asyncio.ensure_future(release(number)) for number in range(4)]
        await begun(service, 4)
        for number in (2, 0, 3, 1):
            service.let_go(number)
            assert await waiting[number] == number
        assert service.num_streams == 1


async def test_calls_that_were_given_up_disturb_no_other() -> None:
    service = Holding()
    service.holds = True
    async with serving(service) as address, streaming(address) as release:
        first, second = (asyncio.ensure_future(release(number)) for number in (1, 2))
        await begun(service, 2)
        first.cancel()
        await asyncio.sleep(0)
        service.let_go(1)
        service.let_go(2)
        assert await second == 2
        service.holds = False
        assert await release(3) == 3
        assert service.num_streams == 1


async def test_more_calls_than_a_stream_may_have_open_wait_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_OPEN_CALLS", 8)
    service = Holding()
    service.holds = True
    async with serving(service) as address, streaming(address) as release:
        waiting = [asyncio.ensure_future(release(number)) for number in range(50)]
        await begun(service, 8)
        await asyncio.sleep(0.05)
        assert len(service.begun) == 8
        for number in range(50):
            service.let_go(number)
        assert await asyncio.gather(*waiting) == list(range(50))


async def test_a_broken_stream_fails_its_calls_at_once_and_the_next_call_opens_another() -> None:
    service = Holding()
    service.holds = True
    async with streaming_over_restart(service) as (release, restart):
        waiting = [asyncio.ensure_future(release(number)) for number in range(3)]
        await begun(service, 3)
        await restart()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, grpc.aio.AioRpcError | StoreUnavailable) for result in results), results
        service.holds = False
        async with asyncio.timeout(10.0):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError, StoreUnavailable):  # until the channel has connected again
                    assert await release(7) == 7
                    break
                await asyncio.sleep(0.02)
        assert service.num_streams == 2


async def test_closing_ends_calls_at_once_wherever_they_are() -> None:
    """Also those that are not written yet, and those that come later."""
    service = Holding()
    service.holds = True
    async with serving(service) as address:
        for _ in range(10):
            client = StoreClient(address, "", timeout_s=60.0)
            client._session_id = "any"
            waiting = [asyncio.ensure_future(client.release([number])) for number in range(30)]
            await asyncio.sleep(0.001)
            async with asyncio.timeout(10.0):
                await client.close()
                results = await asyncio.gather(*waiting, return_exceptions=True)
            assert {type(result) for result in results} == {StoreUnavailable}
            with pytest.raises(StoreUnavailable, match="closed"):
                await client.release([1])


async def test_a_call_that_is_given_up_before_it_is_written_breaks_nothing() -> None:
    service = Holding()
    async with serving(service) as address, streaming(address) as release:
        for number in range(20):
            given_up, other = asyncio.ensure_future(release(1000)), asyncio.ensure_future(release(number))
            await asyncio.sleep(0)
            given_up.cancel()
            assert await other == number
        assert service.num_streams == 1


@contextlib.asynccontextmanager
async def streaming_over_restart(service: Holding) -> AsyncIterator[tuple[Callable[[int], Awaitable[int]], Callable[[], Awaitable[None]]]]:
    """A release, and what replaces the server behind it by another one at the same address."""
    async with contextlib.AsyncExitStack() as servers, contextlib.AsyncExitStack() as clients:
        address = await servers.enter_async_context(serving(service))
        release = await clients.enter_async_context(streaming(address))

        async def restart() -> None:
            await servers.aclose()
            await servers.enter_async_context(serving(service, address))

        yield release, restart


async def test_a_client_names_what_went_wrong(store_process: Callable[..., Any]) -> None:
    """Of a store's refusal its class and words, and of a store that is silent that it is."""
    process = store_process(num_slots=4)
    async with StoreClient(process.address, "another secret") as stranger:
        stranger._session_id = "any"
        with pytest.raises(StoreRefused, match="secret"):
            await stranger.claim([], 1.0)
    service = Holding()
    service.holds = True
    async with serving(service) as address, StoreClient(address, "", timeout_s=0.2) as client:
        client._session_id = "any"
        with pytest.raises(StoreUnavailable, match="no answer to release within 0.2 s"):
            await client.release([1])
        service.holds = False
        assert await client.release([2]) == 2
    with pytest.raises(StoreUnavailable, match="closed"):
        await client.release([3])


async def test_a_call_without_a_request_is_refused(store_process: Callable[..., Any]) -> None:
    process = store_process(num_slots=4)
    async with grpc.aio.insecure_channel(process.address) as channel:
        stream = cache_store_pb2_grpc.CacheStoreStub(channel).Calls(metadata=(("x-mobula-secret", "a secret"),))
        await stream.write(pb.Call(number=5))
        answer = await asyncio.wait_for(stream.read(), 10.0)
        assert (answer.number, answer.refusal.error) == (5, "ValueError")
        await stream.done_writing()
        assert await asyncio.wait_for(stream.read(), 10.0) is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
