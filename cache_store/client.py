"""One engine's connection to its node's store. Control only: bytes move through the arena.

Every call raises a StoreError: StoreUnavailable when the store does not answer in time or does not know the session (it was restarted, or
has ended the session); then a new `attach` is the way on. ArenaTooSmall, LayoutMismatch and StoreRefused mean what their names say.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import grpc

from cache_store.accesses import MissReason as MissReason
from cache_store.calls import CallStream
from cache_store.errors import StoreUnavailable
from cache_store.keys import BlockKey, Layout, join_keys, split_keys
from cache_store.outcomes import ClaimOutcome as ClaimOutcome
from cache_store.outcomes import CommitOutcome as CommitOutcome
from cache_store.outcomes import ReserveOutcome as ReserveOutcome
from cache_store.outcomes import StoreStat as StoreStat
from cache_store.outcomes import WatchEvent as WatchEvent
from cache_store.wire import (
    CLAIM,
    COMMIT,
    ERROR_HEADER,
    ERRORS,
    MAX_MESSAGE_BYTES,
    MISS,
    RESERVE,
    SECRET_HEADER,
    TIER_NAMES,
    layout_to_message,
)
from protos import cache_store_pb2 as pb
from protos import cache_store_pb2_grpc

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # a new client tries at once, whatever others have seen
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20000),
    ("grpc.keepalive_timeout_ms", 5000),
)
_MAX_TTL_MS = (1 << 32) - 1
_CLAIM_OUTCOMES = {number: outcome for outcome, number in CLAIM.items()}
_RESERVE_OUTCOMES = {number: outcome for outcome, number in RESERVE.items()}
_COMMIT_OUTCOMES = {number: outcome for outcome, number in COMMIT.items()}
_MISSES = {int(number): reason for reason, number in MISS.items()}

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class Attached(NamedTuple):
    session_id: str
    epoch: str
    arena_path: str
    arena_bytes: int  # of the whole file
    data_offset: int  # slots begin here; before it lie the generation words
    slot_bytes: int  # of one block


class Found(NamedTuple):
    num_blocks: int
    tier_runs: list[tuple[str, int]]  # tiers "dram", "disk", "peer", in the order of the blocks
    num_cheaper_to_compute: int = 0  # keys behind num_blocks that a tier has, but that are computed faster than brought
    miss_reason: MissReason | None = None  # why the key behind num_blocks is not answered
    pinned: Acquired | None = None  # leading blocks, where some were to be pinned
    claims: Sequence[ClaimOutcome] = ()  # of the keys behind num_blocks, where they were to be claimed


class Slot(NamedTuple):
    offset: int  # from data_offset
    generation: int
    checksums: bytes  # xxh3-64 of every part, little-endian


class Acquired(NamedTuple):
    lease_id: int  # 0 when no block was found
    slots: list[Slot]  # of the leading keys
    tier_runs: list[tuple[str, int]]
    shortfall: MissReason | None = None  # why the other tiers did not bring more


class PinReply(NamedTuple):
    pin_id: int  # 0 when nothing was pinned
    num_blocks: int
    num_bytes: int
    over_quota: bool


class PinEntry(NamedTuple):
    pin_id: int
    owner: str
    num_blocks: int
    num_bytes: int
    remaining_s: float


class ReservedSlot(NamedTuple):
    outcome: ReserveOutcome
    offset: int  # 0 unless RESERVED
    generation: int


class Reserved(NamedTuple):
    lease_id: int  # 0 when nothing was reserved
    slots: list[ReservedSlot]  # one per key


class StoreClient:
    """Made and used on one loop. Closed by `close`; also an async context manager."""

    def __init__(self, address: str, secret: str, *, timeout_s: float = 5.0) -> None:
        """`address` is "unix:/path" or "host:port"; `timeout_s` bounds every call but `watch`."""
        self.address = address
        self._timeout_s = timeout_s
        self._metadata = ((SECRET_HEADER, secret),)
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = cache_store_pb2_grpc.CacheStoreStub(self._channel)  # type: ignore[no-untyped-call]
        self._calls = CallStream(lambda: self._stub.Calls(metadata=self._metadata))
        self._session_id = ""
        self._num_parts = 0

    async def __aenter__(self) -> StoreClient:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def attach(self, layout: Layout, processes: Sequence[tuple[int, int]], label: str) -> Attached:
        """Opens a session in place of this client's earlier one. `processes`: (pid, start_ticks) of all that will touch the arena."""
        self._session_id = ""
        request = pb.AttachRequest(
            layout=layout_to_message(layout),
            processes=[pb.Process(pid=pid, start_ticks=start_ticks) for pid, start_ticks in processes],
            label=label,
        )
        reply: pb.AttachResponse = await self._call(self._stub.Attach, request)
        self._session_id, self._num_parts = reply.session_id, layout.num_parts
        return Attached(reply.session_id, reply.epoch, reply.arena_path, reply.arena_bytes, reply.data_offset, reply.slot_bytes)

    async def detach(self) -> None:
        """Ends the session, if there is one."""
        session_id, self._session_id = self._session_id, ""
        if session_id:
            await self._call(self._stub.Detach, pb.DetachRequest(session_id=session_id))

    async def lookup(
        self,
        keys: Sequence[bytes],
        compute_tokens_per_s: float = 0.0,
        copy_bytes_per_s: float = 0.0,
        *,
        max_pinned: int = 0,
        ttl_s: float = 0.0,
        claim_ttl_s: float = 0.0,
        min_claimed: int = 0,
    ) -> Found:
        """How many leading keys are stored, in whichever tier. With the replica's rate of prefill, blocks are answered only as far as
        bringing them is cheaper than computing them. Of those that are in the arena, up to `max_pinned` leading ones are acquired. With
        `claim_ttl_s` the keys behind those found are claimed, where no tier has any of them and they are `min_claimed` or nothing is
        found."""
        request = pb.LookupRequest(
            session_id=self._session(),
            keys=join_keys(keys),
            compute_tokens_per_s=compute_tokens_per_s,
            copy_bytes_per_s=copy_bytes_per_s,
            max_pinned=max_pinned,
            ttl_ms=_milliseconds(ttl_s),
            claim_ttl_ms=_milliseconds(claim_ttl_s) if claim_ttl_s else 0,
            min_claimed=min_claimed,
        )
        reply: pb.LookupResponse = await self._ask("lookup", request)
        pinned = self._acquired(reply.pinned) if reply.HasField("pinned") else None
        claims = [_CLAIM_OUTCOMES[number] for number in reply.claims]
        miss_reason = _MISSES.get(reply.miss_reason)
        return Found(reply.num_blocks, _runs(reply.tier_runs), reply.num_cheaper_to_compute, miss_reason, pinned, claims)

    async def claim(self, keys: Sequence[bytes], ttl_s: float) -> list[ClaimOutcome]:
        """States the intent to compute blocks; forgotten after `ttl_s`, or when they are stored."""
        request = pb.ClaimRequest(session_id=self._session(), keys=join_keys(keys), ttl_ms=_milliseconds(ttl_s))
        reply: pb.ClaimResponse = await self._ask("claim", request)
        return [_CLAIM_OUTCOMES[number] for number in reply.outcomes]

    async def acquire(self, keys: Sequence[bytes], ttl_s: float, max_wait_s: float = 0.0) -> Acquired:
        """Pins the leading keys that are in the arena, or are brought there within `max_wait_s`, until `release` or for `ttl_s`."""
        request = pb.AcquireRequest(
            session_id=self._session(), keys=join_keys(keys), ttl_ms=_milliseconds(ttl_s), max_wait_ms=self._wait_ms(max_wait_s)
        )
        reply: pb.AcquireResponse = await self._ask("acquire", request)
        return self._acquired(reply)

    async def reserve(self, keys: Sequence[bytes], parents: Sequence[bytes], ttl_s: float, first: Sequence[bool] | None = None) -> Reserved:
        """Slots to write blocks into, parents first. After `ttl_s` without `commit` or `release` the session's processes are killed.

        `first` says per key whether its parent is a root. None: a parent that the store does not know is taken for one.
        """
        request = pb.ReserveRequest(
            session_id=self._session(), keys=join_keys(keys), parents=join_keys(parents), ttl_ms=_milliseconds(ttl_s), first=first or ()
        )
        reply: pb.ReserveResponse = await self._ask("reserve", request)
        slots = zip(reply.outcomes, reply.offsets, reply.generations, strict=True)
        return Reserved(
            reply.lease_id, [ReservedSlot(_RESERVE_OUTCOMES[number], offset, generation) for number, offset, generation in slots]
        )

    async def commit(self, lease_id: int, blocks: Sequence[tuple[BlockKey, Sequence[int], bytes]]) -> list[CommitOutcome]:
        """Per block its key, the indices of the parts that were written, and their checksums (xxh3-64, little-endian)."""
        request = pb.CommitRequest(
            session_id=self._session(),
            lease_id=lease_id,
            keys=join_keys([key for key, _, _ in blocks]),
            num_parts=[len(parts) for _, parts, _ in blocks],
            parts=[part for _, parts, _ in blocks for part in parts],
            checksums=array("Q", b"".join(checksums for _, _, checksums in blocks)),
        )
        reply: pb.CommitResponse = await self._ask("commit", request)
        return [_COMMIT_OUTCOMES[number] for number in reply.outcomes]

    async def release(self, lease_ids: Sequence[int]) -> int:
        """Ends leases; returns how many were still held. Nobody of this session may write to their slots any more."""
        request = pb.ReleaseRequest(session_id=self._session(), lease_ids=lease_ids)
        reply: pb.ReleaseResponse = await self._ask("release", request)
        return reply.num_released

    async def pin(self, owner: str, keys: Sequence[bytes], ttl_s: float, max_wait_s: float = 0.0) -> PinReply:
        """Asks for the leading keys to be kept for `ttl_s`, on the owner's account. They are evicted last; the session may end before."""
        request = pb.PinRequest(
            session_id=self._session(),
            owner=owner,
            keys=join_keys(keys),
            ttl_ms=_milliseconds(ttl_s),
            max_wait_ms=self._wait_ms(max_wait_s),
        )
        reply: pb.PinResponse = await self._call(self._stub.Pin, request)
        return PinReply(reply.pin_id, reply.num_blocks, reply.num_bytes, reply.over_quota)

    async def unpin(self, owner: str, pin_ids: Sequence[int]) -> int:
        """Ends pins of an owner; returns how many there were. Needs no session."""
        reply: pb.UnpinResponse = await self._call(self._stub.Unpin, pb.UnpinRequest(owner=owner, pin_ids=pin_ids))
        return reply.num_unpinned

    async def list_pins(self, owner: str = "") -> list[PinEntry]:
        """An owner's pins; everybody's for the empty owner. Needs no session."""
        reply: pb.ListPinsResponse = await self._call(self._stub.ListPins, pb.ListPinsRequest(owner=owner))
        return [PinEntry(pin.pin_id, pin.owner, pin.num_blocks, pin.num_bytes, pin.remaining_ms / 1000) for pin in reply.pins]

    async def set_peers(self, addresses: Sequence[str]) -> None:
        """Names the stores of other nodes that blocks may be pulled from, in place of those named before. Needs no session."""
        await self._call(self._stub.SetPeers, pb.SetPeersRequest(addresses=addresses))

    async def metrics(self) -> str:
        """Everything the store counts, as Prometheus text. Needs no session."""
        reply: pb.MetricsResponse = await self._call(self._stub.Metrics, pb.MetricsRequest())
        return reply.text

    async def stat(self) -> StoreStat:
        """Needs no session."""
        reply: pb.StatResponse = await self._call(self._stub.Stat, pb.StatRequest())
        return StoreStat(**{name: getattr(reply, name) for name in StoreStat._fields})

    async def check(self) -> list[str]:
        """The store's violated invariants, in words. Needs no session."""
        reply: pb.CheckResponse = await self._call(self._stub.Check, pb.CheckRequest())
        return list(reply.problems)

    async def watch(self) -> AsyncIterator[WatchEvent]:
        """A snapshot, then every change, until the store ends (StoreUnavailable) or the iterator is closed. Needs no session."""
        stream = self._stub.Watch(pb.WatchRequest(), metadata=self._metadata)
        try:
            async for event in stream:
                yield WatchEvent(event.sequence, event.epoch, TIER_NAMES[event.tier], split_keys(event.added), split_keys(event.removed))
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self.address) from error
        finally:
            stream.cancel()
        raise StoreUnavailable(f"{self.address}: the store has ended the stream of events")

    async def close(self) -> None:
        await self._calls.close()
        await self._channel.close()

    def _acquired(self, reply: pb.AcquireResponse) -> Acquired:
        checksums, width = reply.checksums, 8 * self._num_parts
        columns = [checksums[start : start + width] for start in range(0, len(checksums), width)]
        slots = zip(array("Q", reply.offsets), array("Q", reply.generations), columns, strict=True)
        return Acquired(reply.lease_id, list(map(Slot._make, slots)), _runs(reply.tier_runs), _MISSES.get(reply.shortfall))

    def _wait_ms(self, max_wait_s: float) -> int:
        """Less than the call itself may take."""
        return round(1000 * max(0.0, min(max_wait_s, 0.8 * self._timeout_s)))

    def _session(self) -> str:
        if not self._session_id:
            raise StoreUnavailable(f"{self.address}: not attached")
        return self._session_id

    async def _ask(self, kind: str, request: Any) -> Any:
        """The reply to one of the calls that share a stream; `kind` names it."""
        try:
            with self._translating():
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._calls.ask(kind, request)
        except TimeoutError as error:
            raise StoreUnavailable(f"{self.address}: no answer to {kind} within {self._timeout_s:g} s") from error
        if answer.HasField("refusal"):
            raise _refused(answer.refusal.error, answer.refusal.details, self.address)
        return getattr(answer, kind)

    async def _call(self, method: Callable[..., Awaitable[Reply]], request: Request) -> Reply:
        with self._translating():
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """gRPC's errors become those of this module."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self.address) from error
        except grpc.aio.UsageError as error:
            raise StoreUnavailable(f"{self.address}: the client is closed") from error


def _translated(error: grpc.aio.AioRpcError, address: str) -> Exception:
    name = next((str(value) for key, value in error.trailing_metadata() or () if key == ERROR_HEADER), "")
    details = error.details() or ""
    return _refused(name, details if name else f"{error.code().name}: {details}", address)


def _refused(name: str, details: str, address: str) -> Exception:
    """Of the class that the store has named."""
    return ValueError(details) if name == "ValueError" else ERRORS.get(name, StoreUnavailable)(f"{address}: {details}")


def _milliseconds(ttl_s: float) -> int:
    return max(1, round(min(1000 * ttl_s, _MAX_TTL_MS)))


def _runs(pairs: Sequence[int]) -> list[tuple[str, int]]:
    return [(TIER_NAMES[tier], count) for tier, count in zip(pairs[::2], pairs[1::2], strict=True)]
