"""Blocks from the store into pages, for requests that wait for admission.

One wait per request; one job per read, see `load_jobs`:

    QUEUED --near the head of the queue--> LOOKING --store has some--> FOUND --rows and pages to spare--> LOADING
                                            ^  |                        ^                                  |
                                time to look|  |                        +------------more to read----------+
                                            |  |                                                           |all read
                                            |  +--------------there is nothing to read---------------------+
                                            |                                                              v
                                         AWAITING <--------another replica computes the next block---------+
                                           (over) <--otherwise; and after a failure or the deadline, from every phase

Single flight: the lookup also claims the blocks that the store lacks. Where another replica holds the claim of the next one, the request
looks again and again until the block is stored, the claim has ended (that replica died or gave up), or the time is up. Requests wait for
claims on blocks nearer to the root only, so that no two can wait for each other.

The lookup also acquires a job's first blocks. A request that nobody runs or waits beside may go on ahead of its last copies, see
`load_jobs`. When a wait is over the request is admissible, with whatever prefix the pages hold by then: a store that fails is a miss.
Whoever needs a block that is being read for another, or computed by a running row, stays in FOUND until it is there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cache_store.keys import BlockKey
from cache_store.outcomes import ClaimOutcome
from runtime.engine.block_manager import BlockManager
from runtime.engine.claims import FlightClaims
from runtime.engine.config import EngineConfig
from runtime.engine.leases import Leases
from runtime.engine.live import LiveRequest, LoadGate, Phase, StoreVerdict
from runtime.engine.load_jobs import LoadJobs
from runtime.engine.load_state import Job, LoadPhase, Wait
from runtime.engine.rates import MIN_TOKENS, ReplicaRates
from runtime.engine.scheduler import Scheduler
from runtime.engine.store_port import Lookup, StoreAnswer, StorePort, StoreState

if TYPE_CHECKING:
    from cache_store.client import Found


class KvLoads:
    """Owned by the engine's thread, which passes on arrivals, answers and copy results."""

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        port: StorePort,
        copy_ids: Iterator[int],
        block_bytes: int,
        rates: ReplicaRates,
    ) -> None:
        """`block_bytes` of one stored block; `rates` are the replica's."""
        self.leases = Leases(port)
        self.claims = FlightClaims(port)
        self.num_awaited = 0  # blocks that came from the store because a request waited for another replica
        self.jobs = LoadJobs(config, blocks, port, copy_ids, block_bytes, self.leases, self._read_ended)
        self._config, self._blocks, self._port, self._rates = config, blocks, port, rates
        self._waits: dict[LiveRequest, Wait] = {}
        self._lookups: dict[int, Wait] = {}
        self._next_expiry_s = math.inf

    @property
    def next_deadline_s(self) -> float:
        return self._next_expiry_s if self._waits else math.inf

    def phases(self) -> list[str]:
        """Of the requests that wait, in no order; for people and tests, from any thread."""
        return [wait.phase.value for wait in list(self._waits.values())]

    def arrived(self, request: LiveRequest, *, is_alone: bool = False) -> None:
        """The prefix is to be looked up, unless the replica's own pages hold all of it, or all but what is computed at once. `is_alone`: no
        other request runs or waits."""
        if self._port.state is StoreState.NONE or not self._config.prefix_caching:
            return
        if self._port.state is not StoreState.READY:
            request.store_failed = True
            return
        keys = self._reusable_keys(request)
        num_hits = self._blocks.match(keys)
        if num_hits < len(keys) and not self._is_soon_computed(num_hits, len(keys) - num_hits, is_alone):
            self._waits[request] = Wait(request)
            request.load_gate = LoadGate.WAIT

    def ended(self, request: LiveRequest) -> None:
        """The request is gone. Its job, if any, goes on until its copies are answered."""
        wait = self._waits.get(request)
        if wait:
            self._over(wait, request.arrived_s)
        self.claims.let_go(request, lambda key: self._blocks.page_of(key) is not None)

    def advance(self, scheduler: Scheduler, now_s: float) -> None:
        """Does what can be done now: lookups, reads for those who could be admitted next, deadlines, releases."""
        for request in self.jobs.take_void():
            if request.phase is Phase.RUNNING:
                scheduler.start_again(request)
        if self._waits:
            self._serve(scheduler, now_s)
        self.leases.flush()
        self.claims.flush()

    def _serve(self, scheduler: Scheduler, now_s: float) -> None:
        if now_s >= self._next_expiry_s:
            self._expire(now_s)
        window = min(self._config.max_loading_requests, max(1, scheduler.num_open_rows))
        for place, request in enumerate(list(itertools.islice(scheduler.waiting, self._config.lookup_ahead))):
            wait = self._waits.get(request)
            if wait and wait.phase is LoadPhase.QUEUED:
                self._look(wait, now_s, max(1, self._config.first_load_blocks // (place + 1)) if place < window else 0)
            elif wait and wait.phase is LoadPhase.FOUND:
                if place < window:
                    self._read(wait, scheduler, now_s)
                else:
                    self._let_go(wait)
            if wait and wait.phase is LoadPhase.LOADING and scheduler.is_alone(request):
                self._go_ahead(wait, now_s)

    def answered(self, answer: StoreAnswer, now_s: float) -> bool:
        """Takes the store's answer to a question that was asked here."""
        if self.leases.answered(answer.ticket) or self.claims.answered(answer.ticket):
            return True
        wait = self._lookups.pop(answer.ticket, None)
        if wait:
            self._looked(wait, answer.reply, now_s)  # type: ignore[arg-type]  # the reply to Lookup
            return True
        return self.jobs.answered(answer, now_s)

    def lost(self, now_s: float) -> None:
        """The store is gone: no request waits for it. Copies already sent are answered by the ranks all the same."""
        for wait in list(self._waits.values()):
            self._over(wait, now_s, store_failed=True)
        self.leases.lost()
        self.claims.lost()
        self.jobs.drop_unsent(now_s)

    def _reusable_keys(self, request: LiveRequest) -> list[BlockKey]:
        size = self._blocks.block_size
        return request.extend_keys(size)[: request.num_reusable_blocks(size)]

    def _is_soon_computed(self, num_hits: int, num_missing: int, is_alone: bool) -> bool:
        """Whether so few blocks are missing that the step which computes the rest of the prompt hardly takes longer for them, or, where it
        holds up nobody, that it is done before they could be brought."""
        if is_alone and num_missing * self._blocks.block_size <= self._rates.tokens_per_s * self._config.unasked_idle_s:
            return True
        return num_hits > 0 and num_missing <= self._num_soon_computed

    @property
    def _num_soon_computed(self) -> int:
        return int(min(MIN_TOKENS - 1, self._rates.tokens_per_s * self._config.unasked_compute_s)) // self._blocks.block_size

    def _look(self, wait: Wait, now_s: float, max_pinned: int = 0) -> None:
        keys = self._reusable_keys(wait.request)
        num_hits = self._blocks.match(keys)
        if num_hits == len(keys):
            self._over(wait, now_s)
            return
        wanted = keys[num_hits:]
        if self.jobs.is_reading(wanted[0]) or self._blocks.is_announced(wanted[0]):
            max_pinned = 0
        claim_ttl_s = 2 * self._config.single_flight_limit_s(len(wanted) * self._blocks.block_size)
        lease_ttl_s = self._config.lease_ttl_s if max_pinned else 0.0
        ticket = self._port.ask(Lookup(wanted, max_pinned, lease_ttl_s, claim_ttl_s, self._num_soon_computed + 1))
        if ticket is None:
            self._over(wait, now_s, store_failed=True)
            return
        self.claims.asked(wanted)
        wait.num_found = num_hits
        wait.phase = LoadPhase.LOOKING
        wait.look_at_s = math.inf
        self._lookups[ticket] = wait
        self._stop_clock(wait, now_s)
        self._start_clock(wait, now_s)

    def _start_clock(self, wait: Wait, now_s: float) -> None:
        wait.begun_s, wait.deadline_s = now_s, now_s + self._config.load_timeout_s
        self._next_expiry_s = min(self._next_expiry_s, wait.deadline_s)

    def _stop_clock(self, wait: Wait, now_s: float) -> None:
        if wait.begun_s < now_s:
            wait.request.store_wait_s += now_s - wait.begun_s
        wait.begun_s = wait.deadline_s = math.inf

    def _looked(self, wait: Wait, found: Found | None, now_s: float) -> None:
        pinned = found.pinned if found is not None else None
        if pinned and pinned.lease_id:
            self.leases.add(pinned.lease_id, len(pinned.slots))
            wait.pinned = (wait.num_found, pinned)
        wait.num_found += found.num_blocks if found is not None else 0
        claims = found.claims if found is not None else ()
        self._claimed(wait, claims)
        if self._waits.get(wait.request) is not wait:
            self._let_go(wait)
            return
        if found is None:
            self._over(wait, now_s, store_failed=True)
            return
        num_cheaper = found.num_cheaper_to_compute
        wait.request.store_verdict = StoreVerdict(wait.num_found, num_cheaper, found.miss_reason == "evicted")
        if wait.flight_ends_s < math.inf:
            self.num_awaited += found.num_blocks
        self._go_on(wait, now_s)

    def _claimed(self, wait: Wait, outcomes: Sequence[ClaimOutcome]) -> None:
        """Of the blocks behind those found. What is granted is this request's to compute: at once, or when it has what comes before."""
        request = wait.request
        missing = self._reusable_keys(request)[wait.num_found :]
        granted = [key for key, outcome in zip(missing, outcomes, strict=False) if outcome is ClaimOutcome.GRANTED]
        if request.phase is Phase.FINISHED:
            self.claims.give_up(granted)
            return
        self.claims.hold(request, granted)
        wait.is_behind = bool(outcomes) and outcomes[0] is not ClaimOutcome.GRANTED  # stored meanwhile: worth another look as well

    def _go_on(self, wait: Wait, now_s: float) -> None:
        """Reads what the pages lack of what was found, else waits for another replica, else the wait is over."""
        keys = wait.request.keys[: wait.num_found]
        if self._blocks.match(keys) < len(keys):
            wait.phase = LoadPhase.FOUND
            self._stop_clock(wait, now_s)
            return
        if not wait.is_behind:
            self._over(wait, now_s)
            return
        if wait.flight_ends_s == math.inf:
            num_missing = len(self._reusable_keys(wait.request)) - wait.num_found
            wait.flight_ends_s = now_s + self._config.single_flight_limit_s(num_missing * self._blocks.block_size)
        if now_s >= wait.flight_ends_s:
            self._over(wait, now_s)
            return
        self._stop_clock(wait, now_s)
        wait.phase = LoadPhase.AWAITING
        wait.request.load_gate = LoadGate.WAIT
        wait.begun_s, wait.deadline_s = now_s, wait.flight_ends_s
        first_s = self._config.single_flight_poll_s
        wait.look_after_s = min(16 * first_s, max(first_s, 2 * wait.look_after_s))
        wait.look_at_s = now_s + wait.look_after_s
        self._next_expiry_s = min(self._next_expiry_s, wait.look_at_s, wait.deadline_s)

    def _read(self, wait: Wait, scheduler: Scheduler, now_s: float) -> None:
        """Reads what a request still lacks, if it could be admitted with it and nobody else is fetching it."""
        blocks, request = self._blocks, wait.request
        keys = request.keys[: wait.num_found]
        num_hits = blocks.match(keys)
        wanted = self._readable(wait, keys, num_hits, scheduler, now_s)
        pinned = None
        if wanted and wait.pinned and wait.pinned[0] == num_hits:
            (_, pinned), wait.pinned = wait.pinned, None
        self._let_go(wait)
        if wanted:
            request.held_pages.extend(blocks.pin_published(keys[len(request.held_pages) : num_hits]))
            parent = keys[num_hits - 1] if num_hits else request.root
            self.jobs.begin(wait, num_hits, wanted, parent, pinned, now_s)

    def _readable(self, wait: Wait, keys: list[BlockKey], num_hits: int, scheduler: Scheduler, now_s: float) -> list[BlockKey]:
        """The blocks behind `num_hits` that can be read now: there is room for the prompt, and nobody else brings them."""
        blocks, request = self._blocks, wait.request
        if num_hits >= len(keys):
            self._go_on(wait, now_s)
            return []
        needed = -(-len(request.tokens) // blocks.block_size) - num_hits + len(scheduler.running)
        while blocks.num_available - blocks.num_idle(keys[len(request.held_pages) : num_hits]) < needed:
            if not scheduler.drop_held_pages(behind=request):
                request.load_gate = LoadGate.NO_ROOM
                return []
        request.load_gate = LoadGate.WAIT
        if wait.begun_s == math.inf:
            self._start_clock(wait, now_s)
        return [] if blocks.is_announced(keys[num_hits]) else self.jobs.free(keys[num_hits:])

    def _go_ahead(self, wait: Wait, now_s: float) -> None:
        """Ends the wait of a request that nobody else runs or waits beside, when the ranks can make its step ready meanwhile."""
        if not wait.is_behind and self.jobs.go_ahead(wait, self._config.early_step_s * self._rates.copy_bytes_per_s):
            self._over(wait, now_s)

    def _read_ended(self, job: Job, now_s: float) -> None:
        assert job.wait
        if job.num_published == len(job.keys):
            job.wait.phase = LoadPhase.FOUND  # perhaps there is more
        else:
            self._over(job.wait, now_s, store_failed=job.is_failed)

    def _over(self, wait: Wait, now_s: float, *, store_failed: bool = False) -> None:
        """The request waits for the store no longer."""
        del self._waits[wait.request]
        wait.request.store_failed |= store_failed
        wait.request.load_gate = LoadGate.OPEN
        self._stop_clock(wait, now_s)
        self._let_go(wait)
        self.jobs.forsake(wait)

    def _let_go(self, wait: Wait) -> None:
        """What the lookup has acquired is not read."""
        if wait.pinned:
            self.leases.release(wait.pinned[1].lease_id)
            wait.pinned = None

    def _expire(self, now_s: float) -> None:
        """Ends what is past its deadline, and looks again for what is computed elsewhere: once for each block that is waited for."""
        for wait in [wait for wait in self._waits.values() if wait.deadline_s <= now_s]:
            self._over(wait, now_s, store_failed=wait.phase is not LoadPhase.AWAITING)
        asked: set[BlockKey] = set()
        for wait in [wait for wait in self._waits.values() if wait.look_at_s <= now_s]:
            key = wait.request.keys[wait.num_found]
            if key in asked:
                wait.look_at_s = now_s + wait.look_after_s
            else:
                asked.add(key)
                self._look(wait, now_s)
        self._next_expiry_s = min((min(wait.deadline_s, wait.look_at_s) for wait in self._waits.values()), default=math.inf)

    def check(self) -> list[str]:
        """Every violated invariant, in words; empty when all is well."""
        return self.jobs.check() + [
            f"a request waits in {wait.phase} with an open gate" for wait in self._waits.values() if wait.request.load_gate is LoadGate.OPEN
        ]
