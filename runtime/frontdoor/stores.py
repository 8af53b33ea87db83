"""One client per store of the membership, for every method that asks the stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cache_store.client import PinEntry, StoreStat
from runtime.routing.router import Router
from runtime.routing.types import READY, StoreMember


class StoreAccess(Protocol):
    """The part of `cache_store.client.StoreClient` that is used here. Needs no session."""

    async def stat(self) -> StoreStat: ...

    async def list_pins(self, owner: str = "") -> list[PinEntry]: ...

    async def unpin(self, owner: str, pin_ids: Sequence[int]) -> int: ...

    async def close(self) -> None: ...


class StoreClients:
    """Owned by the server. `close` closes all; a client whose store has left the membership is closed when the stores are next asked."""

    def __init__(self, router: Router, connect: Callable[[str], StoreAccess]) -> None:
        self._router, self._connect = router, connect
        self._clients: dict[str, StoreAccess] = {}

    async def members(self) -> list[tuple[StoreMember, StoreAccess | None]]:
        """Every store of the membership; None for one that cannot be asked now."""
        stores = self._router.membership.stores
        await self._close_all_but({store.address for store in stores})
        return [(store, self._client(store)) for store in stores]

    async def close(self) -> None:
        await self._close_all_but(set())

    def _client(self, store: StoreMember) -> StoreAccess | None:
        if store.state != READY or not store.address:
            return None
        if store.address not in self._clients:
            self._clients[store.address] = self._connect(store.address)
        return self._clients[store.address]

    async def _close_all_but(self, addresses: set[str]) -> None:
        for address in self._clients.keys() - addresses:
            await self._clients.pop(address).close()
