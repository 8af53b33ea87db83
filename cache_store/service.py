"""The gRPC face of the store. Messages in, one call to the node, messages out. All on one loop; acquire, Pin and Check wait there."""

from __future__ import annotations

import asyncio
import hmac
import logging
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

import grpc

from cache_store.calls import serve_calls
from cache_store.errors import StoreError
from cache_store.keys import join_keys, split_keys
from cache_store.metrics import render
from cache_store.node import Acquired, StoreNode
from cache_store.outcomes import WatchEvent
from cache_store.watch import pieces
from cache_store.wire import CLAIM, COMMIT, ERROR_HEADER, MISS, RESERVE, SECRET_HEADER, STATUS, TIER, layout_from_message
from protos import cache_store_pb2 as pb
from protos import cache_store_pb2_grpc

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Context = grpc.aio.ServicerContext[Any, Any]


def _answers_later(
    method: Callable[[StoreService, Request], Awaitable[Reply]],
) -> Callable[[StoreService, Request, Context], Awaitable[Reply]]:
    """Turns a method into an rpc: errors become statuses, and deadlines that the call has opened are watched."""

    async def rpc(self: StoreService, request: Request, context: Context) -> Reply:
        try:
            return await method(self, request)
        except (StoreError, ValueError) as error:
            code = STATUS.get(type(error), grpc.StatusCode.INVALID_ARGUMENT)
            await context.abort(code, str(error), ((ERROR_HEADER, type(error).__name__),))
        finally:
            self.arm()

    return rpc


def _answers(
    method: Callable[[StoreService, Request], Reply],
) -> Callable[[StoreService, Request, Context], Awaitable[Reply]]:
    """The same for a method that does not wait."""

    async def at_once(self: StoreService, request: Request) -> Reply:
        return method(self, request)

    return _answers_later(at_once)


class StoreService(cache_store_pb2_grpc.CacheStoreServicer):
    """Borrows the node. Calls `advance` when a deadline comes; without one it sleeps."""

    def __init__(self, node: StoreNode, loop: asyncio.AbstractEventLoop) -> None:
        self._node, self._store, self._loop = node, node.store, loop
        self._timer: asyncio.TimerHandle | None = None
        self._methods: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "lookup": self._lookup,
            "claim": self._claim,
            "acquire": self._acquire,
            "reserve": self._reserve,
            "commit": self._commit,
            "release": self._release,
        }

    def arm(self) -> None:
        """Sets the timer to the store's next deadline, unless it will go off before that anyhow, and lets background work go on."""
        self._node.settle()
        next_s = self._store.next_s()
        if self._timer and (next_s is None or self._timer.when() > next_s):
            self._timer.cancel()
            self._timer = None
        if next_s is not None and self._timer is None:
            self._timer = self._loop.call_at(next_s, self._advance)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _advance(self) -> None:
        self._timer = None
        try:
            self._store.advance()
        finally:
            self.arm()

    def _keys(self, column: bytes) -> list[Any]:
        keys = split_keys(column)
        if len(keys) > self._node.config.max_keys:
            raise ValueError(f"keys: {len(keys)} are more than the {self._node.config.max_keys} that one call may name")
        return keys

    @_answers
    def Attach(self, request: pb.AttachRequest) -> pb.AttachResponse:  # noqa: N802
        processes = [(process.pid, process.start_ticks) for process in request.processes]
        session = self._store.attach(layout_from_message(request.layout), processes, request.label)
        arena = self._store.tier.arena
        return pb.AttachResponse(
            session_id=session.session_id,
            epoch=self._store.epoch,
            arena_path=str(arena.path),
            arena_bytes=arena.total_bytes,
            data_offset=arena.data_offset,
            slot_bytes=session.layout.block_bytes,
        )

    @_answers
    def Detach(self, request: pb.DetachRequest) -> pb.DetachResponse:  # noqa: N802
        self._store.detach(request.session_id)
        return pb.DetachResponse()

    async def _lookup(self, request: pb.LookupRequest) -> pb.LookupResponse:
        keys = self._keys(request.keys)
        looked = self._node.look_up(request.session_id, keys, request.compute_tokens_per_s, request.copy_bytes_per_s)
        pinned = None
        if request.max_pinned:
            pinned = self._node.acquire_found(request.session_id, keys[: request.max_pinned], looked, request.ttl_ms / 1000)
        num_blocks = sum(count for _, count in looked.runs)
        claims, missing = [], keys[num_blocks:]
        if request.claim_ttl_ms and not looked.num_cheaper_to_compute and (len(missing) >= request.min_claimed or not num_blocks):
            claims = self._store.claim(request.session_id, missing, request.claim_ttl_ms / 1000)
        return pb.LookupResponse(
            num_blocks=num_blocks,
            tier_runs=_runs(looked.runs),
            num_cheaper_to_compute=looked.num_cheaper_to_compute,
            miss_reason=MISS[looked.reason] if looked.reason else None,
            pinned=_acquired_message(pinned) if pinned else None,
            claims=[CLAIM[outcome] for outcome in claims],
        )

    async def _claim(self, request: pb.ClaimRequest) -> pb.ClaimResponse:
        outcomes = self._store.claim(request.session_id, self._keys(request.keys), request.ttl_ms / 1000)
        return pb.ClaimResponse(outcomes=[CLAIM[outcome] for outcome in outcomes])

    async def _acquire(self, request: pb.AcquireRequest) -> pb.AcquireResponse:
        keys, ttl_s, max_wait_s = self._keys(request.keys), request.ttl_ms / 1000, request.max_wait_ms / 1000
        return _acquired_message(await self._node.acquire(request.session_id, keys, ttl_s, max_wait_s))

    async def _reserve(self, request: pb.ReserveRequest) -> pb.ReserveResponse:
        keys, parents = self._keys(request.keys), self._keys(request.parents)
        first = request.first or None
        if len(parents) != len(keys) or (first and len(first) != len(keys)):
            raise ValueError(f"parents, first: must have the length of keys, {len(keys)}")
        placed = self._store.reserve(request.session_id, keys, parents, request.ttl_ms / 1000, first)
        slots = [block.slot if block else None for block in placed.blocks]
        return pb.ReserveResponse(
            lease_id=placed.lease_id,
            outcomes=[RESERVE[outcome] for outcome in placed.outcomes],
            offsets=[slot.offset if slot else 0 for slot in slots],
            generations=[slot.generation if slot else 0 for slot in slots],
        )

    async def _commit(self, request: pb.CommitRequest) -> pb.CommitResponse:
        keys, counts = self._keys(request.keys), request.num_parts
        if len(counts) != len(keys) or not sum(counts) == len(request.parts) == len(request.checksums):
            raise ValueError("num_parts, parts, checksums: do not describe the keys")
        parts, checksums = iter(request.parts), iter(request.checksums)
        blocks = [(key, list(islice(parts, n)), list(islice(checksums, n))) for key, n in zip(keys, counts, strict=True)]
        outcomes = self._store.commit(request.session_id, request.lease_id, blocks)
        return pb.CommitResponse(outcomes=[COMMIT[outcome] for outcome in outcomes])

    async def _release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        return pb.ReleaseResponse(num_released=self._store.release(request.session_id, request.lease_ids))

    async def Calls(self, requests: object, context: Context) -> None:  # noqa: N802
        await serve_calls(self._answer, context)

    async def _answer(self, call: pb.Call) -> pb.Answer:
        kind = call.WhichOneof("request")
        try:
            if kind is None:
                raise ValueError("request: a call must have one that is known here")
            return pb.Answer(number=call.number, **{kind: await self._methods[kind](getattr(call, kind))})
        except (StoreError, ValueError) as error:
            return pb.Answer(number=call.number, refusal=pb.Refusal(error=type(error).__name__, details=str(error)))
        finally:
            self.arm()

    @_answers
    def Stat(self, request: pb.StatRequest) -> pb.StatResponse:  # noqa: N802
        return pb.StatResponse(**self._node.stat()._asdict())

    @_answers_later
    async def Check(self, request: pb.CheckRequest) -> pb.CheckResponse:  # noqa: N802
        return pb.CheckResponse(problems=await self._node.check())

    @_answers_later
    async def Pin(self, request: pb.PinRequest) -> pb.PinResponse:  # noqa: N802
        keys, ttl_s, max_wait_s = self._keys(request.keys), request.ttl_ms / 1000, request.max_wait_ms / 1000
        if not request.owner:
            raise ValueError("owner: must name whose quota a pin counts for")
        pin_id, num_blocks, num_bytes, over = await self._node.pin(request.session_id, request.owner, keys, ttl_s, max_wait_s)
        return pb.PinResponse(pin_id=pin_id, num_blocks=num_blocks, num_bytes=num_bytes, over_quota=over)

    @_answers
    def Unpin(self, request: pb.UnpinRequest) -> pb.UnpinResponse:  # noqa: N802
        return pb.UnpinResponse(num_unpinned=self._store.pins.remove(request.owner, request.pin_ids))

    @_answers
    def Metrics(self, request: pb.MetricsRequest) -> pb.MetricsResponse:  # noqa: N802
        return pb.MetricsResponse(text=render(self._node))

    @_answers
    def SetPeers(self, request: pb.SetPeersRequest) -> pb.SetPeersResponse:  # noqa: N802
        self._node.set_peers(request.addresses)
        return pb.SetPeersResponse()

    @_answers
    def ListPins(self, request: pb.ListPinsRequest) -> pb.ListPinsResponse:  # noqa: N802
        now_s = self._loop.time()
        return pb.ListPinsResponse(
            pins=[
                pb.ListPinsResponse.Entry(
                    pin_id=pin.pin_id,
                    owner=pin.owner,
                    num_blocks=len(pin.loan.blocks),
                    num_bytes=pin.num_bytes,
                    remaining_ms=max(0, round(1000 * (pin.deadline_s - now_s))),
                )
                for pin in self._store.pins.of(request.owner)
            ]
        )

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchEvent]:  # noqa: N802
        try:
            queue = self._node.feed.subscribe()
        except StoreError as error:
            await context.abort(STATUS[type(error)], str(error), ((ERROR_HEADER, type(error).__name__),))
        try:
            for snapshot in self._node.snapshots():
                for event in pieces(snapshot):
                    yield event_message(event)
            while True:
                yield event_message(await queue.get())
        finally:
            self._node.feed.unsubscribe(queue)


def _runs(runs: Sequence[tuple[str, int]]) -> list[int]:
    return [number for tier, count in runs for number in (TIER[tier], count)]


def _acquired_message(acquired: Acquired) -> pb.AcquireResponse:
    (lease_id, blocks), shortfall = acquired.pinned, acquired.shortfall
    slots = [block.slot for block in blocks if block.slot]
    return pb.AcquireResponse(
        lease_id=lease_id,
        offsets=array("Q", [slot.offset for slot in slots]).tobytes(),
        generations=array("Q", [slot.generation for slot in slots]).tobytes(),
        checksums=b"".join([block.checksums.tobytes() for block in blocks]),
        tier_runs=_runs(acquired.runs),
        shortfall=MISS[shortfall] if shortfall else None,
    )


def event_message(event: WatchEvent) -> pb.WatchEvent:
    return pb.WatchEvent(
        sequence=event.sequence,
        epoch=event.epoch,
        tier=TIER[event.tier],
        added=join_keys(event.added),
        removed=join_keys(event.removed),
    )


class SecretInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls pass that carry the cluster's secret."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        metadata = dict(handler_call_details.invocation_metadata or ())
        if hmac.compare_digest(str(metadata.get(SECRET_HEADER, "")).encode(), self._secret):
            return await continuation(handler_call_details)

        async def refuse(request: object, context: Context) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{SECRET_HEADER} is missing or wrong", ((ERROR_HEADER, "StoreRefused"),))

        handler = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(refuse)
        streamed = grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        return streamed(refuse)
