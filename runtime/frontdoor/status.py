"""GetStatus: what every replica and store behind this front door says of itself, or why it does not."""

from __future__ import annotations

import asyncio

from cache_store.errors import StoreError
from protos import inference_pb2 as pb
from runtime.errors import ReplicaLost
from runtime.frontdoor.stores import StoreAccess, StoreClients
from runtime.routing.router import Router
from runtime.routing.types import DRAINING, READY, ReplicaMember, StoreMember

LOST = "lost"


class StatusReporter:
    """Borrows the stores' clients, whose calls are bounded in time; `timeout_s` is what a replica gets."""

    def __init__(self, router: Router, stores: StoreClients, timeout_s: float) -> None:
        self._router = router
        self._stores = stores
        self._timeout_s = timeout_s
        self.metrics_address = ""  # set by the server once it listens

    async def report(self, num_live_requests: int) -> pb.GetStatusResponse:
        """Waits up to the time limit for the slowest; nothing that is lost makes the others wait longer."""
        membership = self._router.membership
        replicas, stores = await asyncio.gather(
            asyncio.gather(*(self._replica(member) for member in membership.replicas)),
            asyncio.gather(*(self._store(*member) for member in await self._stores.members())),
        )
        reserved = self._router.reserved().values()
        front_door = pb.FrontDoorStatus(
            live_requests=num_live_requests,
            reserved_requests=sum(share.num_requests for share in reserved),
            reserved_tokens=sum(share.uncached_tokens for share in reserved),
            metrics_address=self.metrics_address,
        )
        return pb.GetStatusResponse(replicas=replicas, stores=stores, front_door=front_door)

    async def _replica(self, member: ReplicaMember) -> pb.ReplicaStatus:
        status = pb.ReplicaStatus(
            replica_id=member.replica_id, state=member.state, detail=member.detail, tensor_parallel_size=member.tensor_parallel_size
        )
        channel = self._router.channel(member.replica_id)
        if member.state not in (READY, DRAINING) or channel is None:
            return status
        try:
            stats = (await channel.status(self._timeout_s)).stats
        except (ReplicaLost, TimeoutError) as error:
            status.state = LOST
            status.detail = str(error) or f"no answer in {self._timeout_s:g} s"
            return status
        status.running, status.waiting = stats.num_running, stats.num_waiting
        status.total_pages, status.used_pages, status.cached_pages = stats.total_pages, stats.used_pages, stats.cached_pages
        status.blocks_pending_offer, status.leased_slots = stats.blocks_pending_offer, stats.leased_slots
        status.num_preemptions, status.step_age_s = stats.num_preemptions, stats.step_age_s
        return status

    async def _store(self, member: StoreMember, client: StoreAccess | None) -> pb.StoreStatus:
        status = pb.StoreStatus(node_id=member.node_id, state=member.state)
        if client is None:
            return status
        try:
            stat = await client.stat()
        except StoreError:
            status.state = LOST
            return status
        status.blocks, status.used_bytes, status.total_bytes = stat.blocks, stat.used_bytes, stat.total_bytes
        status.leased_slots, status.quarantined_slots = stat.leased_blocks + stat.held_slots, stat.quarantined_slots
        status.hits, status.misses, status.evictions = stat.hit_blocks, stat.missed_blocks, stat.evicted_blocks
        status.disk_blocks, status.disk_bytes, status.disk_total_bytes = stat.disk_blocks, stat.disk_bytes, stat.disk_total_bytes
        status.num_peers, status.num_pins, status.pinned_bytes = stat.num_peers, stat.num_pins, stat.kept_bytes
        return status
