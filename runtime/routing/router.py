"""Brings a request to a replica and its outputs back.

Policies choose; the router alone reserves and releases, in one `finally`: a reservation ends with its request, however that ends.
A request whose replica is lost goes on at another one; where something of it has come back, only at one with the same weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cache_store.key_chains import KeyChains
from cache_store.keys import BlockKey, hash_fields, salted_root
from runtime.engine.frames import Hello, RequestOutput, Submit
from runtime.errors import BY_NAME, DeadlinePassed, NoReplica, Overloaded, ReplicaLost, SuspectRequest
from runtime.metrics import ReplicaFigures
from runtime.request import FinishReason, ValidRequest
from runtime.routing.continuation import Continuation
from runtime.routing.engine_channel import ChannelSettings, EngineChannel
from runtime.routing.output_queue import MAX_UNREAD, OutputQueue, Turnstile
from runtime.routing.prefix_index import PrefixIndex
from runtime.routing.suspects import Suspects
from runtime.routing.types import DRAINING, READY, Candidate, Membership, Policy, ReplicaMember, RoutingContext
from workers.errors import GroupFailed

log = logging.getLogger(__name__)

_MAX_DEATHS = 2  # a request seen at two may be their cause
_MAX_INDEXED_BLOCKS = 2048  # of one prompt: enough to tell replicas apart


@dataclass(slots=True)
class Replica:
    """A member with a channel, and what this front door has running there. Only the router changes the counts."""

    member: ReplicaMember
    channel: EngineChannel
    num_requests: int = 0
    uncached_tokens: int = 0


class Reserved(NamedTuple):
    """A replica's share of the router's reservations."""

    num_requests: int
    uncached_tokens: int


class Router:
    """For one event loop. `set_membership` opens and closes channels; `close` ends them all."""

    def __init__(self, policy: Policy, settings: ChannelSettings, on_change: Callable[[], None] = lambda: None) -> None:
        self._policy = policy
        self._settings = settings
        self._on_change = on_change
        self._index = PrefixIndex()
        self._chains = KeyChains()
        self._membership = Membership(-1)
        self._replicas: dict[str, Replica] = {}
        self._wire_ids = itertools.count(1)
        self.turnstile = Turnstile()
        self.suspects = Suspects(time.monotonic)

    @property
    def membership(self) -> Membership:
        return self._membership

    async def set_membership(self, membership: Membership) -> None:
        """Keeps the channels of replicas that stay; the requests of those that went fail with ReplicaLost."""
        if membership.version < self._membership.version:
            return
        self._membership = membership
        wanted = {member.replica_id: member for member in membership.replicas if member.address and member.state in (READY, DRAINING)}
        gone = []
        for replica_id, replica in list(self._replicas.items()):
            member = wanted.get(replica_id)
            if member is None or member.address != replica.channel.address:
                gone.append(self._replicas.pop(replica_id).channel)
            else:
                replica.member = member
        for replica_id, member in wanted.items():
            if replica_id not in self._replicas:
                channel = EngineChannel(replica_id, member.address, self._settings, self._on_change)
                self._replicas[replica_id] = Replica(member, channel)
                channel.start()
        self._on_change()
        await asyncio.gather(*(channel.close() for channel in gone))

    async def close(self) -> None:
        channels = [replica.channel for replica in self._replicas.values()]
        self._replicas.clear()
        await asyncio.gather(*(channel.close() for channel in channels))

    def is_serving(self, max_age_s: float, max_step_age_s: float = math.inf) -> bool:
        """Whether some replica takes requests, answered in the last `max_age_s`, and its ranks are not stuck in a step."""
        oldest_s = asyncio.get_running_loop().time() - max_age_s
        return any(
            replica.channel.last_answer_s >= oldest_s and replica.channel.step_age_s <= max_step_age_s for replica, _ in self._ready()
        )

    def has_ready(self, lost: set[str], weights_digest: bytes | None = None) -> bool:
        """Whether a replica outside `lost` takes requests, one with these weights where they are given."""
        return bool(self._ready_but(lost, weights_digest))

    def max_model_len(self) -> int | None:
        """The shortest context among the ready replicas; None without one."""
        return min((hello.max_model_len for _, hello in self._ready()), default=None)

    def channel(self, replica_id: str) -> EngineChannel | None:
        replica = self._replicas.get(replica_id)
        return replica.channel if replica else None

    def reserved(self) -> dict[str, Reserved]:
        return {replica_id: Reserved(replica.num_requests, replica.uncached_tokens) for replica_id, replica in self._replicas.items()}

    def replica_figures(self) -> list[ReplicaFigures]:
        """What the connected replicas last said of themselves. May be called from any thread."""
        channels = [(replica_id, replica.channel) for replica_id, replica in list(self._replicas.items())]
        return [ReplicaFigures(replica_id, channel.load, stats) for replica_id, channel in channels if (stats := channel.stats)]

    def dispatch(self, request: ValidRequest) -> Dispatch:
        """The request's way through the cluster; nothing is sent before its `outputs` are read."""
        return Dispatch(self, request)

    def new_wire_id(self, request_id: str) -> str:
        """A request id that no earlier request had on any stream, so that late outputs of one are never taken for another's."""
        return f"{request_id}#{next(self._wire_ids)}"

    @contextlib.contextmanager
    def reserve(self, request: ValidRequest, lost: set[str], weights_digest: bytes | None = None) -> Iterator[Reservation]:
        """A place on a replica, released at the end. `lost`: replicas not to try again; `weights_digest`: which it must have, where given.
        NoReplica or Overloaded when there is none."""
        ready = self._ready_but(lost, weights_digest)
        if not ready:
            raise NoReplica(self._why_none_is_ready())
        keys = self._prefix_keys(request, [hello for _, hello in ready])
        candidates = {}
        for replica, hello in ready:
            candidate = self._candidate(replica, hello, keys.get(_root_of(hello), []))
            num_new = len(request.prompt_token_ids) - candidate.prefix_tokens
            if candidate.queued_tokens == 0 or hello.max_queued_tokens <= 0 or candidate.queued_tokens + num_new <= hello.max_queued_tokens:
                candidates[replica.member.replica_id] = candidate
        if not candidates:
            raise Overloaded("the prompt queues of all replicas are full; try again later")
        chosen = self._policy.choose(RoutingContext(len(request.prompt_token_ids)), list(candidates.values()))
        replica, hello = next(entry for entry in ready if entry[0].member.replica_id == chosen.replica_id)
        self._index.record(_holder(hello), keys.get(_root_of(hello), []))
        reservation = Reservation(replica, hello, len(request.prompt_token_ids) - chosen.prefix_tokens)
        replica.num_requests += 1
        replica.uncached_tokens += reservation.uncached_tokens
        try:
            yield reservation
        finally:
            reservation.prompt_computed()
            replica.num_requests -= 1

    def _ready(self) -> list[tuple[Replica, Hello]]:
        replicas = self._replicas.values()
        return [(replica, replica.channel.hello) for replica in replicas if replica.member.state == READY and replica.channel.hello]

    def _ready_but(self, lost: set[str], weights_digest: bytes | None) -> list[tuple[Replica, Hello]]:
        return [
            (replica, hello)
            for replica, hello in self._ready()
            if replica.member.replica_id not in lost and weights_digest in (None, hello.weights_digest)
        ]

    def _why_none_is_ready(self) -> str:
        states = [
            f"{member.replica_id} is {member.state}" + (f" ({detail})" if (detail := self._detail(member)) else "")
            for member in self._membership.replicas
        ]
        return "no replica is ready: " + ("; ".join(states) or "the deployment has none")

    def _detail(self, member: ReplicaMember) -> str:
        channel = self.channel(member.replica_id)
        return member.detail or (channel.problem if channel else "")

    def _candidate(self, replica: Replica, hello: Hello, keys: list[BlockKey]) -> Candidate:
        load = replica.channel.load
        num_blocks = self._index.num_leading(keys, [_holder(hello)])[_holder(hello)]
        return Candidate(
            replica.member.replica_id,
            # What the engine reports covers other front doors; what is reserved here covers what it has not reported yet.
            max(load.num_running + load.num_waiting, replica.num_requests),
            max(load.num_queued_tokens, replica.uncached_tokens),
            num_blocks * hello.block_size,
        )

    def _prefix_keys(self, request: ValidRequest, hellos: list[Hello]) -> dict[tuple[BlockKey, int], list[BlockKey]]:
        """The prompt's block keys for each root and block size; replicas of one model share one."""
        if not self._policy.needs_prefixes:
            return {}
        keys = {}
        for root, block_size in {_root_of(hello) for hello in hellos}:
            # The last prompt token is always computed: a block that ends with it is never reused whole.
            reusable = request.prompt_token_ids[: min(len(request.prompt_token_ids) - 1, _MAX_INDEXED_BLOCKS * block_size)]
            keys[root, block_size] = self._chains.keys(salted_root(root, request.tenant, request.cache_salt), reusable, block_size)
        return keys


class Reservation:
    """A request's place on a replica."""

    def __init__(self, replica: Replica, hello: Hello, uncached_tokens: int) -> None:
        self.replica = replica
        self.hello = hello
        self.uncached_tokens = uncached_tokens

    def prompt_computed(self) -> None:
        """The prompt is no longer in the way of others."""
        self.replica.uncached_tokens -= self.uncached_tokens
        self.uncached_tokens = 0


class Dispatch:
    """One request on its way. `outputs` may be read once; closing it, at any point, aborts the request at its engine."""

    def __init__(self, router: Router, request: ValidRequest) -> None:
        self._router = router
        self._request = request
        self._queue: OutputQueue | None = None
        self._aborted = False
        self._num_deaths = 0  # of replicas that were sent it
        self.replica_id = ""  # where it runs, once it does
        self._ending = ("abort", 0)  # what the engine is told if the outputs are left before their end

    def abort(self) -> None:
        """Ends the outputs with finish reason `abort`, at once."""
        self._aborted = True
        if self._queue is not None:
            self._queue.put(RequestOutput("", [], finish_reason=FinishReason.ABORT))

    def stop_matched(self, num_output_tokens: int) -> None:
        """A stop string was found: the engine is told which of its tokens count when the outputs are closed."""
        self._ending = ("stop", num_output_tokens)

    async def outputs(self) -> AsyncGenerator[list[RequestOutput], None]:
        """What the engine produces, in lists that are longer the later they are read. Ends after a finish reason.

        Raises what the engine reports, DeadlinePassed, NoReplica, Overloaded, SuspectRequest, or ReplicaLost or GroupFailed where no other
        replica can go on.
        """
        router, lost = self._router, set[str]()
        router.suspects.check(self._request)
        continuation = Continuation(self._request)
        weights_digest: bytes | None = None  # of the replicas that something has come from
        while True:
            try:
                request = continuation.request()
                with router.reserve(request, lost, weights_digest) as reservation:
                    self.replica_id = reservation.replica.member.replica_id
                    lost.add(self.replica_id)
                    async with contextlib.aclosing(self._run(request, reservation)) as batches:
                        async for batch in batches:
                            continuation.saw(batch)
                            weights_digest = reservation.hello.weights_digest if continuation.has_begun else None
                            yield batch
                return
            except (ReplicaLost, GroupFailed) as error:
                if self._num_deaths >= _MAX_DEATHS:
                    router.suspects.add(self._request)
                    raise SuspectRequest(f"a second replica has ended while it ran this request: {error}") from error
                if (continuation.has_begun and weights_digest is None) or not router.has_ready(lost, weights_digest):
                    raise
                log.warning("request %s goes on elsewhere: %s", self._request.request_id, error)

    async def _run(self, request: ValidRequest, reservation: Reservation) -> AsyncGenerator[list[RequestOutput], None]:
        """The outputs of one attempt, on one replica."""
        channel = reservation.replica.channel
        wire_id = self._router.new_wire_id(request.request_id)
        loop = asyncio.get_running_loop()
        queue = self._queue = channel.open(_submit(wire_id, request, loop.time()), _max_unread(request))
        timer, turnstile = None, self._router.turnstile
        is_new = True  # until it has a token from here
        turnstile.num_new += 1
        try:
            if self._aborted:
                self.abort()
            if request.deadline_s is not None:
                timer = loop.call_at(
                    request.deadline_s, queue.fail, DeadlinePassed("the request's deadline passed before its output was complete")
                )
            finished = False
            while not finished:
                batch = await queue.take(turnstile, is_new=is_new)
                if is_new and any(output.token_ids for output in batch):
                    is_new = False
                    turnstile.num_new -= 1
                    reservation.prompt_computed()
                last = batch[-1]
                if last.error is not None:
                    name, message = last.error
                    if len(batch) > 1:
                        yield batch[:-1]
                    raise BY_NAME.get(name, BY_NAME["MobulaError"])(message)
                finished = last.finish_reason is not None
                yield batch
        except (ReplicaLost, GroupFailed):
            self._num_deaths += 1
            raise
        finally:
            if is_new:
                turnstile.num_new -= 1
            if timer is not None:
                timer.cancel()
            if request.deadline_s is not None and loop.time() >= request.deadline_s and self._ending[0] == "abort":
                self._ending = ("deadline", 0)
            channel.abort(wire_id, *self._ending)
            self._queue = None


def _submit(wire_id: str, request: ValidRequest, now_s: float) -> Submit:
    return Submit(
        wire_id,
        request.prompt_token_ids.tobytes(),
        request.output_token_ids.tobytes(),
        list(request.sampling),
        request.stop.max_tokens,
        sorted(request.stop.end_token_ids),
        request.tenant,
        request.cache_salt,
        None if request.deadline_s is None else max(0.0, request.deadline_s - now_s),
        request.pin_ttl_s,
    )


def _max_unread(request: ValidRequest) -> int:
    """The logprobs of a prompt come faster than any client reads them, but there are no more of them than the prompt has tokens."""
    num_best = request.sampling.num_prompt_logprobs
    return MAX_UNREAD + (0 if num_best is None else len(request.prompt_token_ids) * (num_best + 1))


def _root_of(hello: Hello) -> tuple[BlockKey, int]:
    """Until an engine knows its weights' digest, what it was sent says nothing about other engines."""
    root = hello.root if hello.root is not None else hash_fields("unknown root", hello.incarnation.encode())
    return BlockKey(root), hello.block_size


def _holder(hello: Hello) -> str:
    return f"{hello.replica_id}/{hello.incarnation}"
