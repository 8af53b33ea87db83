"""Moves one rank's parts of blocks between pages and slots of the store's arena, on threads beside the forward pass.

A slot may be taken away and given to another block at any time, so a copy trusts nothing but what it checks: the slot's generation word
before the first byte and after the last, and for a load the xxh3-64 of every part. A load that fails leaves garbage in its page,
which nobody reads: the page enters no batch before its copy was reported good.

    threads   copies          wait for
    loads     slot -> page    nothing: the engine names only pages that no launched step touches
    saves     page -> slot    on CUDA, the forward passes launched before; so they have threads of their own, and no load waits behind them

On the CPU hashing bounds the speed, at 5 to 10 GB/s a thread where it runs from memory. Cores could not keep up with the link to a GPU, so
there the pages are hashed on the device (`workers.kernels.checksum`), before they leave or after they arrived, and threads only queue work.

The forward pass needs no event to see loaded pages: a copy is reported after its DMA is done, and a plan that reads the page is made
after that report. Saves on the CPU need none either: a plan is executed before its saves are queued.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import struct
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import xxhash

from workers.kv.dma import Dma
from workers.kv.mapping import ArenaMapping
from workers.kv.registration import CudaHostMemory, HostMemory, pieces_of
from workers.step import ArenaSpec, BlockCopy, CopyResult

if TYPE_CHECKING:
    from workers.kernels.checksum import PartHasher
    from workers.kv.layout import PageLayout
    from workers.kv.pool import PagePool

log = logging.getLogger(__name__)

MAX_BATCH = {"cpu": 16, "cuda": 64}  # copies that a thread starts before it waits for the first
MAX_QUEUED_BATCHES = 4096  # of each kind
NUM_LOAD_THREADS = 2  # the next batch is queued while one is under way; on the CPU the cores belong to the forward pass
_JOIN_TIMEOUT_S = 10.0
_CHECKSUM_BYTES = 8


class _Batch(NamedTuple):
    copies: list[BlockCopy]
    mapping: ArenaMapping | None  # None: there was no arena
    event: Any  # CUDA event after which the pages may be read; None: at once


class _Span(NamedTuple):
    """Consecutive parts that this rank copies: where they lie in the page and in the slot, in bytes."""

    first_part: int
    num_parts: int
    page_start: int
    slot_start: int
    part_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_parts * self.part_bytes


class Mover(Protocol):
    """Copies bytes one way, for one thread, which need not be the one that made it."""

    def enter_thread(self) -> None:
        """To be called first."""
        ...

    def start(self, copies: list[BlockCopy], mapping: ArenaMapping, span: _Span) -> None: ...

    def finish(self, copies: list[BlockCopy], mapping: ArenaMapping, span: _Span) -> list[bytes]:
        """Returns once all that was started is in place: of each copy the xxh3-64 of its parts, little-endian."""
        ...


class HostMover:
    """Pages in host memory. numpy's copies let go of the interpreter's lock."""

    def __init__(self, pool: PagePool, *, is_save: bool) -> None:
        self._pool = pool
        self._is_save = is_save

    def enter_thread(self) -> None:
        pass

    def start(self, copies: list[BlockCopy], mapping: ArenaMapping, span: _Span) -> None:
        for copy in copies:
            page = np.asarray(self._pool.page_bytes(copy.page))[span.page_start : span.page_start + span.num_bytes]
            slot = mapping.data[copy.offset + span.slot_start :][: span.num_bytes]
            source, target = (page, slot) if self._is_save else (slot, page)
            np.copyto(target, source)

    def finish(self, copies: list[BlockCopy], mapping: ArenaMapping, span: _Span) -> list[bytes]:
        return [_hash_slot(copy, mapping, span) for copy in copies]


class CudaMover:
    """Pages on the GPU: DMA on a stream of its own, from and to arena memory that CUDA knows."""

    def __init__(self, pool: PagePool, *, is_save: bool, span: _Span) -> None:
        import torch

        self._torch = torch
        self._pool = pool
        self._page_bytes = pool.layout.page_bytes
        self._address: int = pool.tensor.data_ptr()
        self._is_save = is_save
        self._stream = torch.cuda.Stream(pool.tensor.device, priority=-1)  # hashing must not wait behind a forward pass
        self._dma = Dma()
        self._hasher = self._make_hasher(span)

    def enter_thread(self) -> None:
        self._torch.cuda.set_device(self._pool.tensor.device)

    def _make_hasher(self, span: _Span) -> PartHasher | None:
        """Built and tried once here, rather than when a request waits; None where slots have to be hashed instead."""
        from workers.kernels.checksum import PartHasher, can_hash

        if not span.num_parts or not can_hash(span.part_bytes):
            return None
        max_parts = MAX_BATCH["cuda"] * span.num_parts
        hasher = PartHasher(self._pool.tensor.view(self._torch.uint8).flatten(), span.part_bytes, max_parts)
        with self._torch.cuda.stream(self._stream):
            hasher.start(np.zeros(span.num_parts, np.int64))
        self._stream.synchronize()
        return hasher

    def start(self, copies: list[BlockCopy], mapping: ArenaMapping, span: _Span) -> None:
        stream = self._stream.cuda_stream
        if self._is_save:
            self._start_hashes(copies, span)
        pages = np.array([copy.page for copy in copies], np.int64)
        if (pages < 0).any() or (pages >= self._pool.num_pages).any():
            raise IndexError(f"there is no page {pages.min()} or {pages.max()}")
        slots = np.array([copy.offset for copy in copies], np.int64) + span.slot_start
        for first in slots.tolist():
            mapping.register(first, first + span.num_bytes)
        shifts = self._address + pages * self._page_bytes + span.page_start - slots
        starts, sizes, owners = pieces_of(slots, span.num_bytes)
        host, device = mapping.address + starts, shifts[owners] + starts
        if self._is_save:
            self._dma.copy(host, device, sizes, stream, to_host=True)
        else:
            self._dma.copy(device, host, sizes, stream, to_host=False)
        if not self._is_save:
            self._start_hashes(copies, span)

    def _start_hashes(self, copies: list[BlockCopy], span: _Span) -> None:
        if self._hasher is not None:
            pages = np.array([copy.page for copy in copies], np.int64)[:, None]
            parts = np.arange(span.num_parts)[None, :]
            with self._torch.cuda.stream(self._stream):
                self._hasher.start((pages * self._page_bytes + span.page_start + parts * span.part_bytes).ravel())

    def finish(self, copies: list[BlockCopy], mapping: ArenaMapping, span: _Span) -> list[bytes]:
        self._stream.synchronize()
        if self._hasher is None:
            return [_hash_slot(copy, mapping, span) for copy in copies]
        data, width = self._hasher.finish(len(copies) * span.num_parts).astype("<u8").tobytes(), _CHECKSUM_BYTES * span.num_parts
        return [data[start : start + width] for start in range(0, len(data), width)]


class PageCopier:
    """Copies for one rank. `submit` queues; when `fileno()` is readable, `results` has something. One thread owns all calls."""

    def __init__(
        self, pool: PagePool, layout: PageLayout, *, num_load_threads: int | None = None, max_queued_batches: int = MAX_QUEUED_BATCHES
    ) -> None:
        self._pool = pool
        self._on_cuda = bool(getattr(pool.tensor, "is_cuda", False))
        self._store = layout.store
        self._memory: HostMemory | None = CudaHostMemory(pool.tensor.device) if self._on_cuda else None
        self._mapping: ArenaMapping | None = None
        self._done: deque[CopyResult] = deque()
        self._failure: Exception | None = None
        self._closing = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        num_loaders = num_load_threads or NUM_LOAD_THREADS
        self._loads = _Lane(self._span(layout, layout.first_part, layout.num_parts), False, num_loaders, max_queued_batches)
        written = self._span(layout, layout.first_written_part, layout.num_written_parts)
        self._saves = _Lane(written, True, max(1, num_loaders // 4), max_queued_batches)
        self._threads = [
            threading.Thread(
                target=self._serve, args=(lane, self._make_mover(lane)), name="saves" if lane.is_save else "loads", daemon=True
            )
            for lane in (self._loads, self._saves)
            for _ in range(lane.num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _span(self, layout: PageLayout, first_part: int, num_parts: int) -> _Span:
        part_bytes = self._store.part_bytes
        return _Span(first_part, num_parts, (first_part - layout.first_part) * part_bytes, first_part * part_bytes, part_bytes)

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

    def submit(self, loads: list[BlockCopy], saves: list[BlockCopy]) -> None:
        """Queues copies. Saves read what the forward passes launched so far by this thread will have written."""
        event = None
        if saves and self._on_cuda:
            import torch

            event = torch.cuda.Event(blocking=True)  # its waiters sleep
            event.record(torch.cuda.current_stream(self._pool.tensor.device))
        for lane, copies in ((self._loads, loads), (self._saves, saves)):
            size = min(MAX_BATCH["cuda" if self._on_cuda else "cpu"], -(-len(copies) // lane.num_threads)) or 1
            for start in range(0, len(copies), size):
                batch = _Batch(
                    copies[start : start + size], self._mapping.use() if self._mapping else None, event if lane.is_save else None
                )
                try:
                    lane.batches.put_nowait(batch)
                except queue.Full:
                    self._report([_failed(copy, "busy") for copy in batch.copies])
                    _let_go(batch)

    def await_loads(self, timeout_s: float) -> None:
        """Returns when `results` has every load that was submitted. TimeoutError; RuntimeError when a copy thread has ended."""
        batches = self._loads.batches
        with batches.all_tasks_done:
            if not batches.all_tasks_done.wait_for(lambda: not batches.unfinished_tasks or self._failure is not None, timeout_s):
                raise TimeoutError(f"{batches.unfinished_tasks} batches of loads have not ended within {timeout_s:g} s")
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"copying pages failed: {self._failure!r}") from self._failure

    def results(self) -> list[CopyResult]:
        """Copies finished since the last call. RuntimeError when a copy thread has ended."""
        self._check()
        if not self._done:
            return []
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        results = []
        while self._done:
            results.append(self._done.popleft())
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
            os.close(self._fd)

    def _report(self, results: list[CopyResult]) -> None:
        self._done.extend(results)
        os.eventfd_write(self._fd, 1)

    def _make_mover(self, lane: _Lane) -> Mover:
        """Before any thread runs: building kernels and pinning memory would hold up whatever the device is doing then."""
        if self._on_cuda:
            return CudaMover(self._pool, is_save=lane.is_save, span=lane.span)
        return HostMover(self._pool, is_save=lane.is_save)

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
                lane.batches.task_done()
            if batch is not None:
                _let_go(batch)
            else:
                lane.batches.put_nowait(None)  # for the next thread of the lane
        except Exception as error:
            log.exception("a copy thread has ended")
            self._failure = error
            self._report([])
            with lane.batches.all_tasks_done:
                lane.batches.all_tasks_done.notify_all()

    def _run(self, batch: _Batch, mover: Mover, lane: _Lane) -> list[CopyResult]:
        if batch.event is not None:
            batch.event.synchronize()  # here and not on the stream: the deadline counts when a slot would be touched
        reasons = self._why_not(batch.copies, batch.mapping)
        results = [_failed(copy, reason) for copy, reason in zip(batch.copies, reasons, strict=True) if reason]
        started = [copy for copy, reason in zip(batch.copies, reasons, strict=True) if not reason]
        if not started:
            return results
        assert batch.mapping
        hashes = [b""] * len(started)
        if lane.span.num_parts:
            mover.start(started, batch.mapping, lane.span)
            hashes = mover.finish(started, batch.mapping, lane.span)
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
        first, results = lane.span.first_part * _CHECKSUM_BYTES, []
        for copy, generation, column in zip(copies, generations, hashes, strict=True):
            if generation != copy.generation:
                results.append(_failed(copy, "generation"))
            elif lane.is_save:
                results.append(CopyResult(copy.copy_id, True, column))
            elif copy.checksums[first : first + len(column)] != column:
                results.append(_failed(copy, "checksum"))
            else:
                results.append(CopyResult(copy.copy_id, True, b""))
        return results


class _Lane:
    """One direction: its bounded queue, and what each copy moves. None in the queue ends the threads, one after the other."""

    def __init__(self, span: _Span, is_save: bool, num_threads: int, max_queued_batches: int) -> None:
        self.span = span
        self.is_save = is_save
        self.num_threads = num_threads
        self.batches: queue.Queue[_Batch | None] = queue.Queue(max_queued_batches)


def _hash_slot(copy: BlockCopy, mapping: ArenaMapping, span: _Span) -> bytes:
    """xxh3-64 of the span's parts as they are in the slot, little-endian."""
    first = copy.offset + span.slot_start
    parts = mapping.data[first : first + span.num_bytes].data
    size = span.part_bytes
    hashes = [xxhash.xxh3_64_intdigest(parts[start : start + size]) for start in range(0, span.num_bytes, size)]
    return struct.pack(f"<{len(hashes)}Q", *hashes)


def _failed(copy: BlockCopy, reason: str) -> CopyResult:
    return CopyResult(copy.copy_id, False, b"", reason)


def _let_go(batch: _Batch) -> None:
    if batch.mapping is not None:
        batch.mapping.release()
