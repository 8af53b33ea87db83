"""Two stores in two network namespaces: as on two machines, with a cable that can be pulled. Needs root and `ip`; skipped elsewhere."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from cache_store.client import StoreClient
from cache_store.errors import StoreUnavailable
from tests.cache_store.arena_user import ArenaUser
from tests.cache_store.conftest import LAYOUT, REPOSITORY, SECRET, SLOT_BYTES, Child, chain, eventually_async

NAMES = (f"mobula-{os.getpid()}-a", f"mobula-{os.getpid()}-b")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 7011


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=10.0)


@pytest.fixture
def namespaces() -> Iterator[None]:
    links = (f"mb{os.getpid() % 100000}a", f"mb{os.getpid() % 100000}b")
    try:
        try:
            for name in NAMES:
                ip("netns", "add", name)
            ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
            for name, link, address in zip(NAMES, links, ADDRESSES, strict=True):
                ip("link", "set", link, "netns", name, "name", "cable")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name, check=False)


@pytest.fixture
def stores(namespaces: None, shm: Path) -> Iterator[list[str]]:
    """Addresses of two stores started by hand, each in its namespace. The second pulls from the first."""
    addresses = [f"unix:{shm}/{side}.sock" for side in "ab"]
    peers = [["--peer-address", f"{ADDRESSES[0]}:{PORT}"], ["--peer", f"{ADDRESSES[0]}:{PORT}"]]
    processes = []
    try:
        for name, address, peer in zip(NAMES, addresses, peers, strict=True):
            arguments = ["store", "--memory", str(64 * SLOT_BYTES), "--address", address, *peer]
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, sys.executable, "-m", "runtime.cli", *arguments],
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=REPOSITORY,
                    env={**os.environ, "MOBULA_SECRET": SECRET},
                )
            )
        for process in processes:
            assert process.stdout
            assert process.stdout.readline().startswith("ready unix:")
        yield addresses
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(15.0)
            if process.stdout:
                process.stdout.close()


async def test_a_pulled_cable_is_a_miss_and_a_mended_one_a_hit(stores: list[str], idle_child: Callable[[], Child]) -> None:
    async with AsyncExitStack() as stack:
        users = []
        for address in stores:
            client = await stack.enter_async_context(StoreClient(address, SECRET))
            users.append(ArenaUser(client, await client.attach(LAYOUT, [idle_child().identity], "engine"), LAYOUT))
            stack.callback(users[-1].close)
        one, two = users
        first, second, third = chain("first", 12), chain("second", 12), chain("third", 4)

        async def knows(keys: list) -> bool:
            return (await two.client.lookup(keys)).tier_runs == [("peer", len(keys))]

        await one.put(first)
        await eventually_async(lambda: knows(first), 20.0, "news of the first prefix")
        assert (await two.get(first)).tier_runs == [("peer", 12)]
        await one.put(second)
        await eventually_async(lambda: knows(second), 10.0, "news of the second prefix")
        ip("-n", NAMES[0], "link", "set", "cable", "down")
        async with asyncio.timeout(4.0):
            acquired = await two.get(second, max_wait_s=1.0)
        assert (acquired.slots, acquired.shortfall) == ([], "late")
        assert await two.put(third) == third  # the store itself goes on
        ip("-n", NAMES[0], "link", "set", "cable", "up")

        async def comes() -> bool:
            try:
                return len((await two.get(second, max_wait_s=1.0)).slots) == 12
            except StoreUnavailable:
                return False

        await eventually_async(comes, 60.0, "the second prefix over the mended cable")
        assert await two.client.check() == []
