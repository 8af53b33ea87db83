"""The engine's side of the cache store: questions without waiting.

The engine's thread asks, sends and polls; it never blocks here. Questions leave together, after the plan that was made meanwhile: waking
another thread costs the engine a turn of the interpreter's lock. `RemoteStore` answers from a loop on a thread of its own, connects in
the background, notices a store that went away or restarted, and attaches again.

    CONNECTING --attached--> READY --a call fails, another epoch--> LOST --attached--> READY ...

Events come in order: every ticket of one attachment is answered before its StoreLost, and StoreReady comes before any ticket of the next.
Only the answer None to a question that was sent while the store was being lost may come later.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cache_store.errors import StoreError
from cache_store.keys import BlockKey, Layout
from runtime.engine.rates import ReplicaRates
from runtime.loop import LoopThread
from workers.step import ArenaSpec

if TYPE_CHECKING:
    from cache_store.client import Acquired, Attached, ClaimOutcome, CommitOutcome, Found, PinReply, Reserved, StoreClient

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
ACQUIRE_WAIT_S = 1.0  # for blocks to come from disk or peers; a request waits for the store for EngineConfig.load_timeout_s in all
MAX_OUTSTANDING = 256  # questions without an answer yet
PROBE_EVERY_S = 2.0  # an idle engine notices a restarted store within this
BACKOFF_S = (0.1, 2.0)  # first and longest wait between attempts to attach


class Lookup(NamedTuple):
    """-> Found"""

    keys: list[BlockKey]
    max_pinned: int = 0  # leading blocks to acquire with the same question, of those that are in the arena
    ttl_s: float = 0.0  # of these
    claim_ttl_s: float = 0.0  # of a claim on the blocks that are not found; 0: they are not claimed
    min_claimed: int = 0  # fewer are not, unless nothing is found


class Claim(NamedTuple):
    """-> list[ClaimOutcome]"""

    keys: list[BlockKey]
    ttl_s: float


class Acquire(NamedTuple):
    """-> Acquired"""

    keys: list[BlockKey]
    ttl_s: float


class Reserve(NamedTuple):
    """-> Reserved"""

    keys: list[BlockKey]
    parents: list[BlockKey]
    first: list[bool]  # whether the parent is a root
    ttl_s: float


class Commit(NamedTuple):
    """-> list[CommitOutcome]"""

    lease_id: int
    blocks: list[tuple[BlockKey, Sequence[int], bytes]]  # key, part indices, checksums


class Release(NamedTuple):
    """-> int"""

    lease_ids: list[int]


class Pin(NamedTuple):
    """-> PinReply"""

    owner: str  # runtime.request.pin_owner
    keys: list[BlockKey]
    ttl_s: float
    max_wait_s: float  # for blocks to come from disk or peers


Question = Lookup | Claim | Acquire | Reserve | Commit | Release | Pin


class StoreAnswer(NamedTuple):
    ticket: int
    reply: (
        Found | list[ClaimOutcome] | Acquired | Reserved | list[CommitOutcome] | int | PinReply | None
    )  # None: the store could not be asked


class StoreReady(NamedTuple):
    epoch: str
    arena: ArenaSpec


class StoreLost(NamedTuple):
    reason: str


StoreEvent = StoreAnswer | StoreReady | StoreLost


class StoreState(enum.StrEnum):
    NONE = "none"
    CONNECTING = "connecting"
    READY = "ready"
    LOST = "lost"


class StorePort(Protocol):
    """Used by the engine's thread only, but for `wake`, which the port calls from wherever it likes."""

    @property
    def state(self) -> StoreState:
        """As of the events that `poll` has returned."""
        ...

    def start(self, layout: Layout, processes: Sequence[tuple[int, int]], wake: Callable[[], None]) -> None:
        """Begins to attach. `wake` is called when there is something to poll."""
        ...

    def ask(self, question: Question) -> int | None:
        """A ticket; its answer comes with `poll`, some time after `send`. None when the store is not ready or too many questions are
        open."""
        ...

    def send(self) -> None:
        """Lets the questions go that were asked since."""
        ...

    def poll(self) -> list[StoreEvent]: ...

    def close(self) -> None: ...


class NoStore:
    """The port of an engine without a store."""

    state = StoreState.NONE

    def start(self, layout: Layout, processes: Sequence[tuple[int, int]], wake: Callable[[], None]) -> None:
        pass

    def ask(self, question: Question) -> int | None:
        return None

    def send(self) -> None:
        pass

    def poll(self) -> list[StoreEvent]:
        return []

    def close(self) -> None:
        pass


class RemoteStore:
    """A StorePort over gRPC. `close` detaches and ends the thread; also a context manager."""

    def __init__(
        self,
        address: str,
        secret: str,
        label: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        probe_every_s: float = PROBE_EVERY_S,
        rates: ReplicaRates | None = None,
    ) -> None:
        """`rates` are the replica's, which the store weighs its tiers with; None: it answers all that it has."""
        self._address, self._secret, self._label = address, secret, label
        self._timeout_s, self._probe_every_s, self._rates = timeout_s, probe_every_s, rates or ReplicaRates()
        self._state = StoreState.CONNECTING
        self._num_open = 0
        self._num_ready = self._num_attached = 0  # attachments so far, as the engine and as the loop's thread know them
        self._next_ticket = 0
        self._asked: list[tuple[int, Question]] = []  # and not sent
        self._events: deque[StoreEvent] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._client: StoreClient | None = None  # of the current attachment
        self._failed: asyncio.Event | None = None  # of the current attachment; set by the call that failed
        self._reason = ""
        self._wake: Callable[[], None] = lambda: None
        self._session: asyncio.Task[None] | None = None
        self._closing = False
        self._thread = LoopThread("store-port")

    def __enter__(self) -> RemoteStore:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def state(self) -> StoreState:
        return self._state

    def start(self, layout: Layout, processes: Sequence[tuple[int, int]], wake: Callable[[], None]) -> None:
        self._wake = wake
        self._thread.loop.call_soon_threadsafe(self._open, layout, list(processes))

    def ask(self, question: Question) -> int | None:
        if self._state is not StoreState.READY or self._num_open >= MAX_OUTSTANDING or self._closing:
            return None
        self._next_ticket += 1
        self._num_open += 1
        self._asked.append((self._next_ticket, question))
        return self._next_ticket

    def send(self) -> None:
        if self._asked:
            asked, self._asked = self._asked, []
            self._thread.loop.call_soon_threadsafe(self._begin_all, asked, self._num_ready)

    def poll(self) -> list[StoreEvent]:
        events: list[StoreEvent] = []
        while self._events:
            event = self._events.popleft()
            if isinstance(event, StoreAnswer):
                self._num_open -= 1
            elif isinstance(event, StoreReady):
                self._state = StoreState.READY
                self._num_ready += 1
            else:
                self._state = StoreState.LOST
                events += [StoreAnswer(ticket, None) for ticket, _ in self._asked]
                self._num_open -= len(self._asked)
                self._asked.clear()
            events.append(event)
        return events

    def close(self) -> None:
        """Detaches, so that the store takes its slots back at once. Returns within a few call timeouts."""
        if self._closing:
            return
        self._closing = True
        try:
            self._thread.run(self._end_session(), 3 * self._timeout_s)
        except TimeoutError:
            log.warning("the store at %s did not confirm the end of the session", self._address)
        self._thread.close()

    # On the loop's thread

    def _put(self, event: StoreEvent) -> None:
        self._events.append(event)
        self._wake()

    def _open(self, layout: Layout, processes: list[tuple[int, int]]) -> None:
        self._session = asyncio.ensure_future(self._stay_attached(layout, processes))

    async def _end_session(self) -> None:
        if self._session is not None:
            self._session.cancel()
            await asyncio.wait([self._session])

    def _begin_all(self, asked: list[tuple[int, Question]], attachment: int) -> None:
        for ticket, question in asked:
            self._begin(ticket, question, attachment)

    def _begin(self, ticket: int, question: Question, attachment: int) -> None:
        """A question means the attachment that it was asked in: leases of another are not its own."""
        if self._failed is None or self._failed.is_set() or attachment != self._num_attached:
            self._put(StoreAnswer(ticket, None))
            return
        assert self._client is not None
        task = asyncio.ensure_future(self._answer(self._client, ticket, question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, client: StoreClient, ticket: int, question: Question) -> None:
        reply = None
        try:
            reply = await _call(client, question, self._rates)
        except (StoreError, ValueError) as error:  # a question that the store finds wrong must not leave its slots behind
            self._lose(f"{type(question).__name__}: {error}")
        finally:
            self._put(StoreAnswer(ticket, reply))

    def _lose(self, reason: str) -> None:
        if self._failed is not None and not self._failed.is_set():
            self._reason = reason
            self._failed.set()

    async def _stay_attached(self, layout: Layout, processes: list[tuple[int, int]]) -> None:
        from cache_store.client import StoreClient

        backoff_s = BACKOFF_S[0]
        while True:
            client = StoreClient(self._address, self._secret, timeout_s=self._timeout_s)
            try:
                attached = await client.attach(layout, processes, self._label)
            except StoreError as error:
                await client.close()
                if str(error) != self._reason:
                    self._reason = str(error)
                    log.warning("cannot attach to the store at %s: %s; trying again", self._address, error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_S[1])
                continue
            backoff_s = BACKOFF_S[0]
            try:
                await self._stay_with(client, attached)
            finally:
                await self._leave(client)
            log.warning("lost the store at %s: %s; computing without it until it is back", self._address, self._reason)
            self._put(StoreLost(self._reason))

    async def _stay_with(self, client: StoreClient, attached: Attached) -> None:
        """Returns when a call has failed or the store has restarted."""
        self._client, self._failed = client, asyncio.Event()
        arena = ArenaSpec(attached.arena_path, attached.arena_bytes, attached.data_offset, attached.slot_bytes)
        self._num_attached += 1
        self._put(StoreReady(attached.epoch, arena))
        while not self._failed.is_set():
            try:
                await asyncio.wait_for(self._failed.wait(), self._probe_every_s)
            except TimeoutError:
                await self._probe(client, attached.epoch)

    async def _probe(self, client: StoreClient, epoch: str) -> None:
        try:
            stat = await client.stat()
        except StoreError as error:
            self._lose(f"probe: {error}")
        else:
            if stat.epoch != epoch:
                self._lose("the store has restarted")

    async def _leave(self, client: StoreClient) -> None:
        """Answers every open ticket, then ends the session. Its slots come back when the store knows that nobody writes them."""
        assert self._failed is not None
        self._failed.set()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await client.detach()
        except StoreError as error:
            log.info("the store at %s did not take the end of the session: %s", self._address, error)
        await client.close()


async def _call(
    client: StoreClient, question: Question, rates: ReplicaRates
) -> Found | list[ClaimOutcome] | Acquired | Reserved | list[CommitOutcome] | int | PinReply:
    match question:
        case Lookup(keys, max_pinned, ttl_s, claim_ttl_s, min_claimed):
            return await client.lookup(
                keys,
                rates.tokens_per_s,
                rates.copy_bytes_per_s,
                max_pinned=max_pinned,
                ttl_s=ttl_s,
                claim_ttl_s=claim_ttl_s,
                min_claimed=min_claimed,
            )
        case Claim(keys, ttl_s):
            return await client.claim(keys, ttl_s)
        case Acquire(keys, ttl_s):
            return await client.acquire(keys, ttl_s, ACQUIRE_WAIT_S)
        case Reserve(keys, parents, first, ttl_s):
            return await client.reserve(keys, parents, ttl_s, first)
        case Commit(lease_id, blocks):
            return await client.commit(lease_id, blocks)
        case Release(lease_ids):
            return await client.release(lease_ids)
        case Pin(owner, keys, ttl_s, max_wait_s):
            return await client.pin(owner, keys, ttl_s, max_wait_s)
