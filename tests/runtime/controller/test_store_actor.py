"""The store's actor without Ray: what it passes on to the store's process."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cache_store.client import StoreClient
from runtime.config import resolve_settings
from runtime.controller.actors import StoreActor
from tests.cache_store.conftest import eventually_async

SECRET = "a secret"


def test_stores_hear_of_their_peers(tmp_path: Path) -> None:
    flags = {"store_memory": "1MiB", "disk_memory": "1MiB"}
    actors = []
    try:
        for name in "ab":
            (tmp_path / name).mkdir()
            settings = resolve_settings({**flags, "disk_directory": str(tmp_path / name / "disk")}, None, {})
            actors.append(StoreActor(settings.store_config(SECRET)))
        addresses = [actor._process.peer_address for actor in actors]
        assert all(address.startswith("127.0.0.1:") for address in addresses)
        for actor in actors:
            actor.set_peers(addresses)

        async def hears(address: str) -> None:
            async with StoreClient(address, SECRET) as client:

                async def heard() -> bool:
                    stat = await client.stat()
                    return (stat.num_peers, stat.disk_total_bytes) == (1, 1 << 20)  # its own address is left out

                await eventually_async(heard, 10.0, "a peer")

        for actor in actors:
            asyncio.run(hears(actor._process.address))
    finally:
        for actor in actors:
            actor.stop()
    actors[0].set_peers(addresses)  # a store that is gone is told later
