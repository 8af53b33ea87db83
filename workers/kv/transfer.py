"""Moves one rank's parts of blocks between pages and slots of the store's arena, on threads beside the forward pass.

A slot may be taken away and given to another block at any time, so a copy trusts nothing but what it checks: the slot's generation word
before the first byte and after the last, and for a load the xxh3-64 of every part. A load that fails leaves garbage in its page, which
nobody reads but a step that waits for it, and the engine hears of the failure before it hears what came of that.

    threads   copies          wait for
    loads     slot -> page    nothing: the engine names only pages that no launched step touches
    saves     page -> slot    on CUDA, the forward passes launched before; so they have threads of their own, and no load waits behind them

On the CPU hashing bounds the speed, at 5 to 10 GB/s a thread where it runs from memory. Cores could not keep up with the link to a GPU, so
there the pages are hashed on the device (`workers.kernels.checksum`), before they leave or after they arrived, and threads only queue work.

A plan that reads a page is made after its copy was reported, or it says that it waits: on the CPU for the report, on CUDA at gates in
front of layers (`workers.kv.gates`), for which pages are copied a run of layers after the other. Then its answer goes behind the report.
Saves on the CPU need no event: a plan is executed before its saves are queued.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from workers.kv.layout import LoadRun
from workers.kv.mapping import ArenaMapping
from workers.kv.movers import CHECKSUM_BYTES, CudaMover, HostMover, Mover, Route, Span
from workers.kv.registration import CudaHostMemory, HostMemory
from workers.step import ArenaSpec, BlockCopy, CopyResult

if TYPE_CHECKING:
    from workers.kv.gates import LayerGates
    from workers.kv.layout import PageLayout
    from workers.kv.pool import PagePool

log = logging.getLogger(__name__)

MAX_BATCH = {"cpu": 16, "cuda": 64}  # copies that a thread starts before it waits for the first
MAX_LAYERED_BATCH = 128  # on one thread where pages arrive layer by layer: the first layers of all its blocks before the last ones of any
MAX_QUEUED_BATCHES = 4096  # of each kind
NUM_LOAD_THREADS = 2  # the next batch is queued while one is under way; on the CPU the cores belong to the forward pass
_JOIN_TIMEOUT_S = 10.0


class _Batch(NamedTuple):
    number: int  # in its lane
    copies: list[BlockCopy]
    mapping: ArenaMapping | None  # None: there was no arena
    event: Any  # CUDA event after which the pages may be read; None: at once


class PageCopier:
    """Copies for one rank. `submit` queues; when `fileno()` is readable, `results` has something. One thread owns all calls, but for
    `results` and `await_loads`, which another may call with the first one's leave."""

    def __init__(
        self,
        pool: PagePool,
        layout: PageLayout,
        gates: LayerGates | None = None,
        *,
        num_load_threads: int | None = None,
        max_queued_batches: int = MAX_QUEUED_BATCHES,
    ) -> None:
        """`gates`: of the forward pass, for the layout's runs of layers."""
        self._pool = pool
        self._gates = gates
        self._on_cuda = bool(getattr(pool.tensor, "is_cuda", False))
        self._store = layout.store
        self._memory: HostMemory | None = CudaHostMemory(pool.tensor.device) if self._on_cuda else None
        self._mapping: ArenaMapping | None = None
        self._reporting = threading.Lock()  # protects the next one; it is empty where the descriptor has nothing to read
        self._done: list[CopyResult] = []
        self._failure: Exception | None = None
        self._closing = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        num_loaders = num_load_threads or NUM_LOAD_THREADS
        runs = layout.load_runs
        is_layered = self._on_cuda and len(runs) > 1
        max_batch = MAX_BATCH["cuda" if self._on_cuda else "cpu"]
        loaded = self._span(layout, layout.first_part, layout.num_parts)
        written = self._span(layout, layout.first_written_part, layout.num_written_parts)
        route = Route(loaded, runs, False, MAX_LAYERED_BATCH if is_layered else max_batch)
        self._loads = _Lane(route, num_loaders, 1 if is_layered else num_loaders, max_queued_batches)
        first_written = layout.first_written_part - layout.first_part
        whole = LoadRun(0, (written.page_start,), written.num_bytes, range(first_written, first_written + written.num_parts))
        num_savers = max(1, num_loaders // 4)
        self._saves = _Lane(Route(written, [whole], True, max_batch), num_savers, num_savers, max_queued_batches)
        movers = [(lane, self._make_mover(lane)) for lane in (self._loads, self._saves) for _ in range(lane.num_threads)]
        self._load_movers = [mover for lane, mover in movers if lane is self._loads]
        self._threads = [
            threading.Thread(target=self._serve, args=(lane, mover), name="saves" if lane.route.is_save else "loads", daemon=True)
            for lane, mover in movers
        ]
        for thread in self._threads:
            thread.start()

    def _span(self, layout: PageLayout, first_part: int, num_parts: int) -> Span:
        part_bytes = self._store.part_bytes
        return Span(first_part, num_parts, (first_part - layout.first_part) * part_bytes, first_part * part_bytes, part_bytes)

    def fileno(self) -> int:
        return self._fd

    def attach(self, spec: ArenaSpec) -> None:
        """Copies submitted from now on mean this arena; those before keep theirs. One that cannot be mapped fails them as "arena"."""
        old, self._mapping = self._mapping, None
        if old is not None:
            old.retire()
        try:
            self._mapping = ArenaMapping(spec, self._memory)
        except OSError as error:
            log.warning("cannot map the arena, so copies will fail: %s", error)

    def submit(self, loads: list[BlockCopy], saves: list[BlockCopy]) -> int:
        """Queues copies. Saves read what the forward passes launched so far by this thread will have written. Returns how many batches of
        loads have been queued so far, for `await_loads`."""
        event = None
        if saves and self._on_cuda:
            import torch

            event = torch.cuda.Event(blocking=True)  # its waiters sleep
            event.record(torch.cuda.current_stream(self._pool.tensor.device))
        for lane, copies in ((self._loads, loads), (self._saves, saves)):
            size = lane.batch_size(len(copies))
            for start in range(0, len(copies), size):
                mapping = self._mapping.use() if self._mapping else None
                batch = _Batch(lane.num_put, copies[start : start + size], mapping, event if lane.route.is_save else None)
                if not lane.put(batch):
                    self._report([_failed(copy, "busy") for copy in batch.copies])
                    _let_go(batch)
        return self._loads.num_put

    def await_loads(self, num_batches: int, timeout_s: float) -> None:
        """Returns when `results` has every load of the first `num_batches`. TimeoutError; RuntimeError when a copy thread has ended."""
        self._await(self._loads.open, num_batches, timeout_s)

    def gate_loads(self, timeout_s: float) -> bool:
        """Has the forward pass that is launched next wait, layer by layer, for the loads that were submitted; which of them are good,
        `results` says later. False where there are no gates. TimeoutError; RuntimeError when a copy thread has ended."""
        if self._gates is None:
            return False
        self._await(self._loads.unbegun, self._loads.num_put, timeout_s)
        self._gates.close_behind(list(zip(*(mover.arrivals for mover in self._load_movers), strict=True)))
        return True

    def _await(self, batches: set[int], num_batches: int, timeout_s: float) -> None:
        """Until none of the first `num_batches` is in the set."""

        def is_over() -> bool:
            return self._failure is not None or min(batches, default=num_batches) >= num_batches

        with self._loads.changed:
            if not self._loads.changed.wait_for(is_over, timeout_s):
                raise TimeoutError(f"{len(batches)} batches of loads have taken longer than {timeout_s:g} s")
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"copying pages failed: {self._failure!r}") from self._failure

    def results(self) -> list[CopyResult]:
        """Copies finished since the last call. RuntimeError when a copy thread has ended."""
        results: list[CopyResult] = []
        if self._done:
            with self._reporting:
                if self._done:  # not closed meanwhile
                    os.eventfd_read(self._fd)
                results, self._done = self._done, []
        self._check()  # behind the read, which may have taken the news of a failure
        return results

    def close(self) -> None:
        """Lets running copies end, drops queued ones and unmaps the arena. Idempotent."""
        if self._closing:
            return
        self._closing = True
        for lane in (self._loads, self._saves):
            with contextlib.suppress(queue.Full):
                lane.batches.put_nowait(None)  # only to wake a thread that waits: a full queue does that too
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT_S)
        for lane in (self._loads, self._saves):
            while not lane.batches.empty():
                if batch := lane.batches.get_nowait():
                    _let_go(batch)
        if self._mapping is not None:
            self._mapping.retire()
            self._mapping.join(_JOIN_TIMEOUT_S)
            self._mapping = None
        if not any(thread.is_alive() for thread in self._threads):  # else one may still write to it
            with self._reporting:
                os.close(self._fd)
                self._done = []

    def _report(self, results: list[CopyResult]) -> None:
        with self._reporting:
            self._done += results
            os.eventfd_write(self._fd, 1)

    def _make_mover(self, lane: _Lane) -> Mover:
        """Before any thread runs: building kernels and pinning memory would hold up whatever the device is doing then."""
        if self._on_cuda:
            return CudaMover(self._pool, lane.route)
        return HostMover(self._pool, lane.route)

    def _serve(self, lane: _Lane, mover: Mover) -> None:
        """A copy thread. An error that is not a copy's own ends the rank, by way of `results`."""
        try:
            mover.enter_thread()
            while (batch := lane.batches.get()) is not None and not self._closing:
                try:
                    results = self._run(batch, mover, lane)
                finally:
                    _let_go(batch)
                self._report(results)
                lane.note_ended(batch)
            if batch is not None:
                _let_go(batch)
            else:
                lane.batches.put_nowait(None)  # for the next thread of the lane
        except Exception as error:
            log.exception("a copy thread has ended")
            self._failure = error
            self._report([])
            with lane.changed:
                lane.changed.notify_all()

    def _run(self, batch: _Batch, mover: Mover, lane: _Lane) -> list[CopyResult]:
        if batch.event is not None:
            batch.event.synchronize()  # here and not on the stream: the deadline counts when a slot would be touched
        reasons = self._why_not(batch.copies, batch.mapping)
        results = [_failed(copy, reason) for copy, reason in zip(batch.copies, reasons, strict=True) if reason]
        started = [copy for copy, reason in zip(batch.copies, reasons, strict=True) if not reason]
        if started and lane.route.span.num_parts:
            assert batch.mapping
            mover.start(started, batch.mapping)
        lane.note_begun(batch)
        if not started:
            return results
        assert batch.mapping
        hashes = mover.finish(started, batch.mapping) if lane.route.span.num_parts else [b""] * len(started)
        return results + self._judge(started, batch.mapping, lane, hashes)

    def _why_not(self, copies: list[BlockCopy], mapping: ArenaMapping | None) -> list[str]:
        """Why each copy cannot start; empty when it can."""
        now_s = time.monotonic()
        if mapping is None or not mapping.is_whole():
            return ["deadline" if now_s > copy.deadline_s else "arena" for copy in copies]
        offsets = np.array([copy.offset for copy in copies], np.int64)
        is_inside = mapping.holds(offsets, self._store.block_bytes)
        generations = mapping.generations(np.where(is_inside, offsets, 0))
        return [
            "deadline" if now_s > copy.deadline_s else "arena" if not inside else "" if generation == copy.generation else "generation"
            for copy, inside, generation in zip(copies, is_inside.tolist(), generations.tolist(), strict=True)
        ]

    def _judge(self, copies: list[BlockCopy], mapping: ArenaMapping, lane: _Lane, hashes: list[bytes]) -> list[CopyResult]:
        """Last of all the generation words: the same as before means that copy and hash saw one block's bytes."""
        generations = mapping.generations(np.array([copy.offset for copy in copies], np.int64)).tolist()
        first, results = lane.route.span.first_part * CHECKSUM_BYTES, []
        for copy, generation, column in zip(copies, generations, hashes, strict=True):
            if generation != copy.generation:
                results.append(_failed(copy, "generation"))
            elif lane.route.is_save:
                results.append(CopyResult(copy.copy_id, True, column))
            elif copy.checksums[first : first + len(column)] != column:
                results.append(_failed(copy, "checksum"))
            else:
                results.append(CopyResult(copy.copy_id, True, b""))
        return results


class _Lane:
    """One direction: its bounded queue, and what has become of its batches. None in the queue ends the threads, one after the other."""

    def __init__(self, route: Route, num_threads: int, num_sharing: int, max_queued_batches: int) -> None:
        """`num_sharing` of the threads share copies that come together."""
        self.route = route
        self.num_threads = num_threads
        self._num_sharing = num_sharing
        self.batches: queue.Queue[_Batch | None] = queue.Queue(max_queued_batches)
        self.num_put = 0
        self.changed = threading.Condition()  # protects the sets, of numbers of batches
        self.unbegun: set[int] = set()  # until their copies are queued on the device, or found to be impossible
        self.open: set[int] = set()  # until their results are there

    def batch_size(self, num_copies: int) -> int:
        return min(self.route.max_batch, -(-num_copies // self._num_sharing)) or 1

    def put(self, batch: _Batch) -> bool:
        """False where the queue is full."""
        with self.changed:
            try:
                self.batches.put_nowait(batch)
            except queue.Full:
                return False
            self.num_put += 1
            self.unbegun.add(batch.number)
            self.open.add(batch.number)
        return True

    def note_begun(self, batch: _Batch) -> None:
        with self.changed:
            self.unbegun.remove(batch.number)
            self.changed.notify_all()

    def note_ended(self, batch: _Batch) -> None:
        with self.changed:
            self.open.remove(batch.number)
            self.changed.notify_all()


def _failed(copy: BlockCopy, reason: str) -> CopyResult:
    return CopyResult(copy.copy_id, False, b"", reason)


def _let_go(batch: _Batch) -> None:
    if batch.mapping is not None:
        batch.mapping.release()
