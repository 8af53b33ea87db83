from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from runtime.frontdoor.server import FrontDoor, FrontDoorConfig
from runtime.routing.types import Membership, ReplicaMember
from runtime.text.tokenizer import Tokenizer
from tests.runtime.frontdoor.fake_engine import FakeEngine, eventually
from tests.runtime.frontdoor.model_folder import write_model


class Setup(NamedTuple):
    """A front door with its engines and a client."""

    door: FrontDoor
    engines: list[FakeEngine]
    stub: Any
    address: str
    channel: grpc.aio.Channel

    async def generate(self, request: pb.GenerateRequest, **options: Any) -> list[pb.GenerateEvent]:
        return [event async for event in self.stub.Generate(request, timeout=options.pop("timeout", 10), **options)]

    def check_idle(self) -> None:
        """Nothing is left of any request."""
        assert all(tuple(reserved) == (0, 0) for reserved in self.door.router.reserved().values())
        assert self.door.router.turnstile.num_new == 0
        for engine in self.engines:
            channel = self.door.router.channel(engine.hello.replica_id)
            assert channel is None or channel.num_live == 0


def membership(version: int, *engines: FakeEngine) -> Membership:
    replicas = [ReplicaMember(engine.hello.replica_id, f"127.0.0.1:{engine.port}", "ready") for engine in engines]
    return Membership(version, tuple(replicas))


@asynccontextmanager
async def running(folder: Path, engines: list[FakeEngine], **config: Any) -> AsyncIterator[Setup]:
    async with AsyncExitStack() as stack:
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        door = FrontDoor(FrontDoorConfig(str(folder), **config))
        address = await door.start()
        stack.push_async_callback(door.stop, 0.0)
        await door.set_membership(membership(1, *engines))
        await eventually(lambda: all(engine.num_streams for engine in engines) and (not engines or door.router.is_serving(60)))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield Setup(door, engines, rpc.InferenceStub(channel), address, channel)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return loaded


@pytest.fixture
async def one(folder: Path) -> AsyncIterator[Setup]:
    """One front door over one engine; nothing may be left of any request at the end."""
    async with running(folder, [FakeEngine()]) as setup:
        yield setup
        await eventually(lambda: not setup.door.router.channel("r0") or setup.door.router.channel("r0").num_live == 0)
        setup.check_idle()


@pytest.fixture
def run_engines(folder: Path) -> Callable[..., Any]:
    def start(*engines: FakeEngine, **config: Any) -> Any:
        return running(config.pop("folder", folder), list(engines), **config)

    return start


def ids_request(token_ids: list[int], **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids), sampling=pb.SamplingParams(**sampling))


async def status_of(call: Any) -> grpc.aio.AioRpcError:
    """Reads a call until it fails; the failure."""
    try:
        async with asyncio.timeout(10):
            if hasattr(call, "__aiter__"):
                async for _ in call:
                    pass
            else:
                await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call succeeded")


def text_of(events: list[pb.GenerateEvent]) -> str:
    return "".join(event.tokens.text for event in events)


def tokens_of(events: list[pb.GenerateEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.tokens.token_ids]
