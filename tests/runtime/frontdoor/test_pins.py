"""Pins from the client's call to the store and back: two tenants over a real engine and a real store, and the command line."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from typer.testing import CliRunner

from cache_store.config import StoreConfig
from cache_store.process import StoreProcess
from cache_store.processes import process_identity
from protos import inference_pb2 as pb
from runtime.api_keys import bearer, read_api_keys
from runtime.cli import app
from runtime.commands import pins as pins_command
from runtime.engine.store_port import RemoteStore
from runtime.errors import DeploymentError, UsageError
from runtime.routing.types import StoreMember
from tests.runtime.frontdoor.conftest import Setup, ids_request, membership, running, status_of
from tests.runtime.frontdoor.real_engine import MAX_LEN, RealEngine, RealStoreGroup, make_info

SECRET = "between us"
KEYS = {"blue": "blue-key-1", "green": "green-key-1"}
PROMPT = list(range(10, 50))  # ten blocks


class Pinned(NamedTuple):
    setup: Setup
    store: StoreMember

    async def pin(self, tenant: str, prompt: list[int] = PROMPT, ttl_s: float = 60.0) -> int:
        """What the service says that became of it."""
        request = ids_request(prompt, max_tokens=1)
        request.pin_ttl_s = ttl_s
        return int((await self.setup.generate(request, metadata=bearer(KEYS[tenant])))[-1].finished.usage.pin)

    async def listed(self, tenant: str) -> pb.ListPinsResponse:
        answer: pb.ListPinsResponse = await self.setup.stub.ListPins(pb.ListPinsRequest(), timeout=5, metadata=bearer(KEYS[tenant]))
        return answer

    async def await_pins(self, tenant: str, count: int) -> list[pb.Pin]:
        async with asyncio.timeout(10):
            while True:
                pins = list((await self.listed(tenant)).pins)
                if len(pins) == count:
                    return pins
                await asyncio.sleep(0.005)

    def unpin(self, tenant: str, *pin_ids: str, everything: bool = False) -> Any:
        return self.setup.stub.Unpin(pb.UnpinRequest(pin_ids=pin_ids, all=everything), timeout=5, metadata=bearer(KEYS[tenant]))


@pytest.fixture
def rank() -> Iterator[tuple[int, int]]:
    """A process that may be registered with a store, and killed by it."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process_identity(process.pid)
        process.kill()


@pytest.fixture
async def pinned(folder: Path, tmp_path: Path, rank: tuple[int, int]) -> AsyncIterator[Pinned]:
    key_file = tmp_path / "keys.toml"
    key_file.write_text("".join(f'{tenant} = "{key}"\n' for tenant, key in KEYS.items()))
    config = StoreConfig(memory_bytes=1 << 20, extent_bytes=1 << 20, secret=SECRET, directory=str(tmp_path))
    with StoreProcess(config) as store:
        address = await asyncio.to_thread(store.start)
        with RemoteStore(address, SECRET, "r0", probe_every_s=0.1) as remote:
            info = make_info(60, max_model_len=MAX_LEN)._replace(pids=[rank])
            engine = RealEngine(store=remote, group=RealStoreGroup(info), secret=SECRET)
            async with running(folder, [engine], api_keys=read_api_keys(key_file), secret=SECRET) as setup:  # type: ignore[list-item]
                member = StoreMember("n0", address)
                await setup.door.set_membership(membership(2, *setup.engines)._replace(stores=(member,)))
                yield Pinned(setup, member)


async def test_tenants_pin_see_and_unpin_their_own(pinned: Pinned) -> None:
    assert await pinned.pin("blue", ttl_s=0.0) == pb.PIN_OUTCOME_UNSPECIFIED
    assert await pinned.pin("blue", PROMPT[:3]) == pb.PIN_TOO_SHORT
    assert await pinned.pin("blue") == pb.PIN_TAKEN
    (blue,) = await pinned.await_pins("blue", 1)
    assert (blue.node_id, blue.num_blocks, blue.pin_id[:3]) == ("n0", 10, "n0:")
    assert 0 < blue.remaining_s <= 60.0
    assert (await pinned.listed("green")).pins == []
    assert await pinned.pin("green") == pb.PIN_TAKEN
    (green,) = await pinned.await_pins("green", 1)
    assert green.pin_id != blue.pin_id
    (status,) = (await pinned.setup.stub.GetStatus(pb.GetStatusRequest(), timeout=5, metadata=bearer(KEYS["blue"]))).stores
    assert (status.num_pins, status.leased_slots) == (2, 0)
    assert status.pinned_bytes == blue.num_bytes + green.num_bytes > 0
    answer = await pinned.unpin("green", blue.pin_id, "n0:999999", "elsewhere:1")
    assert (answer.num_unpinned, answer.unreachable_nodes) == (0, [])
    assert (await pinned.unpin("green", everything=True)).num_unpinned == 1
    assert [pin.pin_id for pin in (await pinned.listed("blue")).pins] == [blue.pin_id]
    assert (await pinned.unpin("blue", blue.pin_id)).num_unpinned == 1
    assert (await pinned.unpin("blue", everything=True)).num_unpinned == 0


async def test_stores_that_do_not_answer_are_named(pinned: Pinned) -> None:
    await pinned.pin("blue")
    await pinned.await_pins("blue", 1)
    stores = (pinned.store, StoreMember("n1", "unix:/nowhere/at/all"), StoreMember("n2", "", "starting"))
    await pinned.setup.door.set_membership(membership(3, *pinned.setup.engines)._replace(stores=stores))
    answer = await pinned.listed("blue")
    assert (len(answer.pins), list(answer.unreachable_nodes)) == (1, ["n1", "n2"])
    answer = await pinned.unpin("blue", answer.pins[0].pin_id, "n1:3")
    assert (answer.num_unpinned, list(answer.unreachable_nodes)) == (1, ["n1"])


async def test_what_is_no_pin_is_named(pinned: Pinned) -> None:
    wrong = ("", "7", ":7", "n0:", "n0:x", "n0:-1", "n0:\u0663", f"n0:{1 << 64}", "n0:" + "9" * 5000)
    for request in [pb.UnpinRequest(pin_ids=["n0:1", pin_id]) for pin_id in wrong]:
        error = await status_of(pinned.setup.stub.Unpin(request, timeout=5, metadata=bearer(KEYS["blue"])))
        assert (error.code(), error.details()[:11]) == (grpc.StatusCode.INVALID_ARGUMENT, "pin_ids[1]:")
    for request in (pb.UnpinRequest(), pb.UnpinRequest(pin_ids=["n0:1"], all=True), pb.UnpinRequest(pin_ids=["n0:1"] * 5000)):
        error = await status_of(pinned.setup.stub.Unpin(request, timeout=5, metadata=bearer(KEYS["blue"])))
        assert (error.code(), error.details()[:8]) == (grpc.StatusCode.INVALID_ARGUMENT, "pin_ids:")


async def test_the_command_line(pinned: Pinned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = tmp_path / "prompt.txt"
    text.write_text("a quick brown fox jumps over the lazy dog, again and again")
    where = ("--address", pinned.setup.address, "--api-key", KEYS["blue"])

    async def run(*arguments: str) -> str:
        return (await asyncio.to_thread(CliRunner().invoke, app, [*arguments, *where], catch_exceptions=False)).output

    pin = json.loads(await run("cache", "pin", "--prompt-file", str(text), "--ttl", "50", "--json"))
    assert pin["num_blocks"] > 0
    assert 0 < pin["remaining_s"] <= 50.0
    assert pin["pin_id"] in await run("cache", "pin", "--prompt-file", str(text), "--ttl", "60"), "renewed"
    listed = json.loads(await run("cache", "list", "--json"))
    assert ([row["pin_id"] for row in listed["pins"]], listed["unreachable_nodes"]) == ([pin["pin_id"]], [])
    ids = ",".join(map(str, PROMPT))
    done = json.loads(await run("generate", "--token-ids", ids, "--max-tokens", "1", "--pin-ttl", "60", "--json"))
    assert done["usage"]["pin"] == "taken"
    await pinned.await_pins("blue", 2)
    assert "MiB pinned" in await run("status")
    assert "1 unpinned" in await run("cache", "unpin", pin["pin_id"])
    assert "1 unpinned" in await run("cache", "unpin", "--all")
    assert pin["pin_id"] not in await run("cache", "list")

    monkeypatch.setattr(pins_command, "SHOWN_WITHIN_S", 0.2)
    await run("cache", "pin", "--token-ids", ids, "--ttl", "60")
    with pytest.raises(DeploymentError, match="no new pin"):
        await run("cache", "pin", "--token-ids", ids, "--ttl", "30")
    with pytest.raises(DeploymentError, match="no full block"):
        await run("cache", "pin", "--token-ids", "5", "--ttl", "30")
    with pytest.raises(UsageError, match="--ttl"):
        await run("cache", "pin", "--token-ids", "5", "--ttl", "0")
    with pytest.raises(UsageError, match="--all"):
        await run("cache", "unpin")
    with pytest.raises(UsageError, match="--prompt-file .*nowhere"):
        await run("cache", "pin", "--prompt-file", str(tmp_path / "nowhere"), "--ttl", "1")
