"""ListPins and Unpin: what the stores keep for one tenant. Each store is asked with the tenant as owner, so nobody sees another's pins."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from cache_store.errors import StoreError
from protos import inference_pb2 as pb
from runtime.errors import BadRequest
from runtime.frontdoor.stores import StoreAccess, StoreClients
from runtime.request import pin_owner
from runtime.routing.types import StoreMember

MAX_PIN_IDS = 4096  # in one call
_MAX_NUMBER = (1 << 64) - 1


class PinKeeper:
    """Borrows the stores' clients, whose calls are bounded in time. A store that does not answer is named, never an error."""

    def __init__(self, stores: StoreClients) -> None:
        self._stores = stores

    async def list(self, tenant: str) -> pb.ListPinsResponse:
        """Of all stores; those that end first come first."""
        members = await self._stores.members()
        answers = await asyncio.gather(*(self._list_one(tenant, *member) for member in members))
        pins = [pin for answer in answers for pin in answer or ()]
        pins.sort(key=lambda pin: pin.remaining_s)
        unreachable = [store.node_id for (store, _), answer in zip(members, answers, strict=True) if answer is None]
        return pb.ListPinsResponse(pins=pins, unreachable_nodes=unreachable)

    async def unpin(self, tenant: str, request: pb.UnpinRequest) -> pb.UnpinResponse:
        """BadRequest for what is no pin's id. An id that is not there, or another tenant's, is not counted."""
        numbers = _numbers_by_node(request.pin_ids)
        if request.all == bool(numbers):
            raise BadRequest("pin_ids: name pins, or set all; not both")
        members = [member for member in await self._stores.members() if request.all or member[0].node_id in numbers]
        answers = await asyncio.gather(
            *(self._unpin_one(tenant, None if request.all else numbers[store.node_id], client) for store, client in members)
        )
        return pb.UnpinResponse(
            num_unpinned=sum(answer or 0 for answer in answers),
            unreachable_nodes=[store.node_id for (store, _), answer in zip(members, answers, strict=True) if answer is None],
        )

    async def _list_one(self, tenant: str, store: StoreMember, client: StoreAccess | None) -> Sequence[pb.Pin] | None:
        """None: no answer."""
        if client is None:
            return None
        try:
            entries = await client.list_pins(pin_owner(tenant))
        except StoreError:
            return None
        return [
            pb.Pin(
                node_id=store.node_id,
                pin_id=f"{store.node_id}:{entry.pin_id}",
                num_blocks=entry.num_blocks,
                num_bytes=entry.num_bytes,
                remaining_s=entry.remaining_s,
            )
            for entry in entries
        ]

    async def _unpin_one(self, tenant: str, numbers: Sequence[int] | None, client: StoreAccess | None) -> int | None:
        """How many there were; `numbers` None: all of the tenant's. None: no answer."""
        if client is None:
            return None
        owner = pin_owner(tenant)
        try:
            if numbers is None:
                numbers = [entry.pin_id for entry in await client.list_pins(owner)]
            return await client.unpin(owner, numbers) if numbers else 0
        except StoreError:
            return None


def _numbers_by_node(pin_ids: Sequence[str]) -> dict[str, list[int]]:
    if len(pin_ids) > MAX_PIN_IDS:
        raise BadRequest(f"pin_ids: at most {MAX_PIN_IDS} may be named, not {len(pin_ids)}")
    numbers: dict[str, list[int]] = defaultdict(list)
    for index, pin_id in enumerate(pin_ids):
        node_id, _, digits = pin_id.rpartition(":")
        if not node_id or not (digits.isascii() and digits.isdecimal()) or len(digits) > 20 or int(digits) > _MAX_NUMBER:
            raise BadRequest(f"pin_ids[{index}]: must be NODE:NUMBER, as ListPins gives it, not {pin_id[:256]!r}")
        numbers[node_id].append(int(digits))
    return numbers
