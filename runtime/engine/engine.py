"""One replica's engine: `step()` is the machine, everything else feeds it.

    other threads                         the engine's thread: run() = step() again and again
    submit, abort --> inbox ------------> _listen   arrivals, aborts, answers of the store, deadlines
    store's loop  --> port, wake               |
                                          _plan     coordinators say what may be copied, the scheduler what is computed
                                               |
    workers <---- submit(plan) -----------     |    up to pipeline_depth steps are launched before the first result is needed
            ----- poll() -> results ----> _apply    tokens, ends, published blocks; copies
                                               |
    front doors <---------- sink -------- _tell     one call per step

Every wait of the loop is `group.poll`, which ends by a result, by `wake`, or at the next deadline. The state below belongs to the engine's
thread alone; other threads see the inbox and the last snapshot of `stats`.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from cache_store.key_chains import KeyChains
from cache_store.keys import BlockKey, hash_fields, root_key, salted_root
from runtime.engine.block_manager import BlockManager
from runtime.engine.config import EngineConfig as EngineConfig
from runtime.engine.frames import EngineStats, Hello, Load, RequestOutput
from runtime.engine.inbox import AbortRequest, Inbox, Message
from runtime.engine.kv_loads import KvLoads
from runtime.engine.kv_offers import KvOffers
from runtime.engine.kv_pins import KvPins
from runtime.engine.live import EngineRequest as EngineRequest
from runtime.engine.live import LiveRequest, Phase, RequestKey
from runtime.engine.outputs import Outputs
from runtime.engine.rates import ReplicaRates
from runtime.engine.scheduler import Launched, Scheduler
from runtime.engine.store_port import NoStore, StoreAnswer, StorePort, StoreReady
from runtime.errors import GroupFailed, MobulaError
from runtime.request import FinishReason
from workers.step import CopyResult, StepResult, WorkerGroup

log = logging.getLogger(__name__)

_REASONS = {"abort": FinishReason.ABORT, "stop": FinishReason.STOP}


class Sink(Protocol):
    def __call__(self, outputs: dict[int, list[RequestOutput]], load: Load) -> None:
        """What one step gave each stream. Called on the engine's thread; must not block."""
        ...


class Engine:
    """Owns scheduler, pages and coordinators. The caller owns the group and the store's port, and closes them after `run` has returned."""

    def __init__(
        self,
        config: EngineConfig,
        group: WorkerGroup,
        store: StorePort | None,
        sink: Sink,
        *,
        digest: Callable[[], bytes] | None = None,
        processes: tuple[tuple[int, int], ...] = (),
        rates: ReplicaRates | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`digest` computes the weights digest where the group does not know it; it runs on a thread of its own, and until it is done the
        store is not used. `processes` besides the ranks (this engine's) are registered with the store.
        """
        info = group.info
        if info.num_pages < 2:
            raise ValueError(f"a pool of {info.num_pages} pages holds no request: page 0 is never used")
        self.config = config
        self.info = info
        self.max_model_len = min(info.max_model_len, (info.num_pages - 1) * info.block_size)
        self.blocks = BlockManager(info.num_pages, info.block_size)
        self.limits = config.step_limits(info.max_num_seqs, info.max_num_batched_tokens, info.max_prompt_tokens_beside_outputs)
        self.scheduler = Scheduler(config, self.limits, self.blocks)
        self.outputs = Outputs(self.blocks, publish=config.prefix_caching)
        port = store or NoStore()
        copy_ids = itertools.count(1)
        self._rates = rates or ReplicaRates()
        self.loads = KvLoads(config, self.blocks, port, copy_ids, info.layout.block_bytes, self._rates)
        self.offers = KvOffers(config, self.blocks, port, copy_ids, info.layout.num_parts)
        self.pins = KvPins(config, self.blocks, port, self.offers)
        self.blocks.on_publish, self.blocks.on_evict = self.offers.published, self.offers.evicted
        self._group, self._port, self._sink, self._clock = group, port, sink, clock
        self._processes = processes
        self._inbox = Inbox(config)
        self._taken: list[Message] = []
        self._live: dict[RequestKey, LiveRequest] = {}
        self._arrivals = itertools.count()
        self._chains = KeyChains()
        self._deadlines: list[tuple[float, int, LiveRequest]] = []
        self._launched: deque[tuple[Launched, float]] = deque()
        self._stopping = threading.Event()
        self._oldest_launch_s: float | None = None  # of the launched steps without a result
        self._num_steps = 0
        self._load = Load(0, 0, 0)
        self._weights_digest: bytes | None = None
        self._root: BlockKey | None = None
        self._local_root = BlockKey(hash_fields("local", config.incarnation.encode()))
        self._stats = self._snapshot()
        if info.weights_digest is not None:
            self._adopt(info.weights_digest)
        elif digest is not None:
            threading.Thread(target=self._find_digest, args=(digest,), name="weights-digest", daemon=True).start()

    # From any thread

    def submit(self, request: EngineRequest) -> None:
        """Overloaded, DuplicateRequest or GroupFailed; any later end of the request comes through the sink."""
        self._inbox.submit(request)
        self._group.wake()

    def abort(self, key: RequestKey, reason: str = "abort", num_output_tokens: int = 0) -> None:
        """Ends a request, where it is still live. `num_output_tokens` are kept when `reason` is "stop"."""
        if self._inbox.abort(key, reason, num_output_tokens):
            self._group.wake()

    def abort_stream(self, stream: int) -> None:
        for request_id in self._inbox.live_in(stream):
            self.abort((stream, request_id))

    def stop(self) -> None:
        """Makes `run` end: live requests get an error, copies in flight are waited for."""
        self._stopping.set()
        self._group.wake()

    def stats(self) -> EngineStats:
        launched_s = self._oldest_launch_s
        return self._stats._replace(step_age_s=0.0 if launched_s is None else max(0.0, self._clock() - launched_s))

    @property
    def load(self) -> Load:
        return self._load

    def hello(self) -> Hello:
        config = self.config
        return Hello(
            config.replica_id,
            config.incarnation,
            self._weights_digest,
            self._root,
            self.info.block_size,
            self.max_model_len,
            config.max_queued_tokens,
        )

    # The engine's thread

    def run(self) -> GroupFailed | None:
        """Steps until `stop`, or until the group fails: then every live request ends with that error, which is returned."""
        try:
            while not self._stopping.is_set():
                self.step()
            self._end_all("ReplicaLost", "the engine was stopped")
            self._await_copies()
        except GroupFailed as error:
            log.error("the group of replica %s failed: %s", self.config.replica_id, error)
            self._end_all("GroupFailed", str(error))
            return error
        return None

    def step(self) -> None:
        """Launches at most one step, then takes what is done. Blocks only when there is nothing to launch."""
        self._listen()
        launched = self._plan()
        if launched is not None:
            self._group.submit(launched.plan)
            if launched.admitted:
                self.outputs.admitted(launched)
                self._send_outputs()
        self._port.send()
        for answer in self._group.poll(self._patience(launched)):
            self._apply(answer)
        self._tell()

    def check(self) -> list[str]:
        """Violated invariants of pages and coordinators, in words; empty when all is well."""
        return self.blocks.check() + self.loads.check()

    def _listen(self) -> None:
        """Takes in what came from outside, and lets the coordinators act on it."""
        now_s = self._clock()
        self._taken += (messages := self._inbox.take())
        for message in messages:
            if isinstance(message, EngineRequest):
                self._arrive(message, now_s)
            elif isinstance(message, AbortRequest):
                self._abort(message)
            else:
                self._adopt(message.weights_digest)
        for event in self._port.poll():
            if isinstance(event, StoreAnswer):
                _ = self.loads.answered(event, now_s) or self.offers.answered(event, now_s) or self.pins.answered(event, now_s)
            elif isinstance(event, StoreReady):
                self._group.attach_arena(event.arena)
                self.offers.attached()
            else:
                self._lose_store(now_s)
        while self._deadlines and self._deadlines[0][0] <= now_s:
            request = heapq.heappop(self._deadlines)[2]
            if request.phase is not Phase.FINISHED:
                self._end(request, error=("DeadlinePassed", "the request's deadline passed before its output was complete"))
        self.loads.advance(self.scheduler, now_s)
        self.pins.advance(now_s)  # first: it may offer
        self.offers.advance(now_s)

    def _plan(self) -> Launched | None:
        if len(self._launched) >= self.config.pipeline_depth:
            return None
        launched = self.scheduler.plan(self.loads.jobs.take_copies(), self.offers.take_copies())
        if launched is not None:
            now_s = self._clock()
            self._rates.copies_sent(len(launched.plan.loads), now_s)
            for request in launched.admitted:
                request.admitted_s = request.admitted_s if request.admitted_s is not None else now_s
            self._launched.append((launched, now_s))
            self._oldest_launch_s = self._launched[0][1]
        return launched

    def _patience(self, launched: Launched | None) -> float:
        """How long the loop may wait: not at all while another step could be launched, else until the next deadline."""
        if launched is not None and len(self._launched) < self.config.pipeline_depth:
            return 0.0
        deadline_s = min(self.loads.next_deadline_s, self.offers.next_deadline_s, self.pins.next_deadline_s)
        if self._deadlines:
            deadline_s = min(deadline_s, self._deadlines[0][0])
        return min(self.config.idle_poll_s, max(0.0, deadline_s - self._clock()))

    def _apply(self, answer: StepResult | CopyResult) -> None:
        now_s = self._clock()
        if isinstance(answer, CopyResult):
            if self.loads.jobs.copied(answer, now_s):
                self._rates.copy_done(self.info.layout.block_bytes if answer.ok else 0, now_s)
            else:
                self.offers.copied(answer)
            return
        launched, launched_s = self._launched.popleft()
        self._rates.step_done(launched.plan, launched_s, now_s)
        self._oldest_launch_s = self._launched[0][1] if self._launched else None
        if launched.plan.sequence != answer.sequence:
            raise GroupFailed(f"the group answered step {answer.sequence} where {launched.plan.sequence} was next")
        self._num_steps += 1
        for request in self.outputs.apply(launched, answer, now_s):
            self._forget(request)

    def _tell(self) -> None:
        """Hands outputs to the sink, and the new load to everybody."""
        scheduler = self.scheduler
        self._load = Load(len(scheduler.running), len(scheduler.waiting), scheduler.num_queued_tokens)
        self._inbox.settle(self._taken, self._load)
        self._taken = []
        self._stats = self._snapshot()
        self._send_outputs()

    def _send_outputs(self) -> None:
        outputs = self.outputs.take()
        if outputs:
            self._sink(outputs, self._load)

    def _arrive(self, request: EngineRequest, now_s: float) -> None:
        if len(request.prompt) + min(1, request.max_tokens) > self.max_model_len or not request.prompt:
            message = (
                f"prompt: {len(request.prompt)} tokens and an output do not fit into {self.max_model_len}, this replica's longest context"
            )
            self.outputs.refuse(request.stream, request.request_id, ("BadRequest", message))
            self._inbox.ended(request.key)
            return
        live = LiveRequest(request, next(self._arrivals), now_s, self.max_model_len, self._request_root(request), self._chains)
        self._live[request.key] = live
        self.pins.arrived(live)
        self.scheduler.add(live)
        if request.output and (request.output[-1] in request.end_token_ids or len(live.tokens) >= live.limit):
            ended_by_token = request.output[-1] in request.end_token_ids
            self._end(live, reason=FinishReason.STOP if ended_by_token else FinishReason.LENGTH)
            return
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, live.arrival, live))
        self.loads.arrived(live, is_alone=len(self._live) == 1)

    def _abort(self, message: AbortRequest) -> None:
        request = self._live.get(message.key)
        if request is None:
            return  # it ended by itself meanwhile
        if message.reason in _REASONS:
            del request.tokens[request.num_prompt + message.num_output_tokens :]
            self._end(request, reason=_REASONS[message.reason])
        else:
            self._end(request, error=("DeadlinePassed", "the front door's deadline for the request passed"))

    def _end(self, request: LiveRequest, *, reason: FinishReason | None = None, error: tuple[str, str] | None = None) -> None:
        self.outputs.end(request, self._clock(), reason=reason, error=error)
        self._forget(request)

    def _forget(self, request: LiveRequest) -> None:
        """Gives back all that a request holds; what copies or launched steps still touch returns with their results."""
        self.loads.ended(request)
        self.scheduler.remove(request)
        del self._live[request.key]
        self._inbox.ended(request.key)
        if len(self._deadlines) > 64 + 2 * len(self._live):
            self._deadlines = [entry for entry in self._deadlines if entry[2].phase is not Phase.FINISHED]
            heapq.heapify(self._deadlines)

    def _request_root(self, request: EngineRequest) -> BlockKey:
        return salted_root(self._root or self._local_root, request.tenant, request.cache_salt)

    def _find_digest(self, digest: Callable[[], bytes]) -> None:
        try:
            weights_digest = digest()
        except (MobulaError, OSError) as error:
            log.error("replica %s works without the store: the weights cannot be hashed: %s", self.config.replica_id, error)
            return
        self._inbox.digest_known(weights_digest)
        self._group.wake()

    def _adopt(self, weights_digest: bytes) -> None:
        """The root is known: blocks published under the local one are published again under it, and the store may be used."""
        info = self.info
        self._root = root_key(
            weights_digest=weights_digest,
            model_config=info.model_config,
            compute_dtype=info.compute_dtype,
            weight_quantisation=self.config.weight_quantisation,
            adapter="",
            layout=info.layout,
            numerics=self.config.numerics,
        )
        self._weights_digest = weights_digest
        self.blocks.forget_published()
        for request in self._live.values():
            request.root, request.keys, request.num_published, request.waits_for = self._request_root(request.request), [], 0, None
        self._port.start(info.layout, [*info.pids, *self._processes], self._group.wake)

    def _lose_store(self, now_s: float) -> None:
        self.loads.lost(now_s)
        self.offers.lost()
        self.pins.lost()

    def _end_all(self, name: str, message: str) -> None:
        for untaken in self._inbox.close(message):
            if isinstance(untaken, EngineRequest):
                self.outputs.refuse(untaken.stream, untaken.request_id, (name, message))
        for request in list(self._live.values()):
            self._end(request, error=(name, message))
        self._tell()

    def _await_copies(self) -> None:
        """The ranks still copy for leases that end with the port: waits for them, within a bound."""
        self._lose_store(self._clock())
        limit_s = self._clock() + self.config.stop_timeout_s
        while (self._launched or self.loads.jobs.num_open_copies or self.offers.num_open_copies) and self._clock() < limit_s:
            for answer in self._group.poll(0.1):
                self._apply(answer)
        self._tell()

    def _snapshot(self) -> EngineStats:
        blocks, scheduler = self.blocks, self.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            total_pages=self.info.num_pages - 1,
            used_pages=blocks.num_used - self.offers.num_pages_only_here,
            cached_pages=blocks.num_cached,
            blocks_pending_offer=self.offers.num_pending,
            leased_slots=self.loads.leases.num_slots + self.offers.leases.num_slots,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            step_age_s=0.0,
            store_state=self._port.state.value,
        )
