"""The bytes of copies, one way each: between a rank's pages and slots of the mapped arena, in host memory or by DMA.

Cores could not keep up with the link to a GPU, so what lies on one is hashed there, beside the copies.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import xxhash

from workers.kv.dma import Dma
from workers.kv.layout import LoadRun
from workers.kv.mapping import ArenaMapping
from workers.kv.registration import pieces_of
from workers.step import BlockCopy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.kernels.checksum import PartHasher
    from workers.kv.pool import PagePool

CHECKSUM_BYTES = 8


class Span(NamedTuple):
    """Consecutive parts that this rank copies: where they lie in the page and in the slot, in bytes."""

    first_part: int
    num_parts: int
    page_start: int
    slot_start: int
    part_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_parts * self.part_bytes


class Route(NamedTuple):
    """What each copy of one direction moves."""

    span: Span
    runs: list[LoadRun]  # the same on a GPU, in the order in which it is copied
    is_save: bool
    max_batch: int  # copies that are started before the first is waited for


class Mover(Protocol):
    """Copies bytes one way, for one thread, which need not be the one that made it."""

    def enter_thread(self) -> None:
        """To be called first."""
        ...

    def start(self, copies: list[BlockCopy], mapping: ArenaMapping) -> None:
        """On CUDA no more than queues them, since a step may wait for that."""
        ...

    def finish(self, copies: list[BlockCopy], mapping: ArenaMapping) -> list[bytes]:
        """Returns once all that was started last is in place: of each copy the xxh3-64 of its parts, little-endian."""
        ...

    @property
    def arrivals(self) -> Sequence[Any]:
        """Of each run the CUDA event behind the last copies that were started; none on the CPU."""
        ...


class HostMover:
    """Pages in host memory. numpy's copies let go of the interpreter's lock."""

    arrivals: tuple[Any, ...] = ()

    def __init__(self, pool: PagePool, route: Route) -> None:
        self._pool = pool
        self._route = route

    def enter_thread(self) -> None:
        pass

    def start(self, copies: list[BlockCopy], mapping: ArenaMapping) -> None:
        span = self._route.span
        for copy in copies:
            page = np.asarray(self._pool.page_bytes(copy.page))[span.page_start : span.page_start + span.num_bytes]
            slot = mapping.data[copy.offset + span.slot_start :][: span.num_bytes]
            source, target = (page, slot) if self._route.is_save else (slot, page)
            np.copyto(target, source)

    def finish(self, copies: list[BlockCopy], mapping: ArenaMapping) -> list[bytes]:
        return [_hash_slot(copy, mapping, self._route.span) for copy in copies]


class CudaMover:
    """Pages on the GPU: DMA on a stream of its own, from and to arena memory that CUDA knows."""

    def __init__(self, pool: PagePool, route: Route) -> None:
        import torch

        self._torch = torch
        self._pool = pool
        self._route = route
        self._page_bytes = pool.layout.page_bytes
        self._address: int = pool.tensor.data_ptr()
        self._stream = torch.cuda.Stream(pool.tensor.device)
        self._hash_stream = torch.cuda.Stream(pool.tensor.device, priority=-1)  # hashing must not wait behind a forward pass
        self.arrivals = [torch.cuda.Event() for _ in route.runs]
        self._dma = Dma()
        self._hasher = self._make_hasher()

    def enter_thread(self) -> None:
        self._torch.cuda.set_device(self._pool.tensor.device)

    def _make_hasher(self) -> PartHasher | None:
        """Built and tried once here, rather than when a request waits; None where slots have to be hashed instead."""
        from workers.kernels.checksum import PartHasher, can_hash

        span = self._route.span
        if not span.num_parts or not can_hash(span.part_bytes):
            return None
        max_parts = self._route.max_batch * span.num_parts
        hasher = PartHasher(self._pool.tensor.view(self._torch.uint8).flatten(), span.part_bytes, max_parts)
        with self._torch.cuda.stream(self._hash_stream):
            hasher.put(np.zeros(span.num_parts, np.int64))
            hasher.start(0, span.num_parts)
        self._hash_stream.synchronize()
        return hasher

    def start(self, copies: list[BlockCopy], mapping: ArenaMapping) -> None:
        span, is_save = self._route.span, self._route.is_save
        pages = np.array([copy.page for copy in copies], np.int64)
        if (pages < 0).any() or (pages >= self._pool.num_pages).any():
            raise IndexError(f"there is no page {pages.min()} or {pages.max()}")
        offsets = np.array([copy.offset for copy in copies], np.int64)
        mapping.register(offsets + span.slot_start, span.num_bytes)
        for run, arrival in zip(self._route.runs, self.arrivals, strict=True):
            begins = np.array(run.starts, np.int64)
            slots = (offsets[:, None] + (span.slot_start - span.page_start + begins)[None, :]).ravel()
            shifts = (self._address + pages[:, None] * self._page_bytes + begins[None, :]).ravel() - slots
            starts, sizes, owners = pieces_of(slots, run.num_bytes)
            host, device = mapping.address + starts, shifts[owners] + starts
            source, target = (device, host) if is_save else (host, device)
            self._dma.copy(target, source, sizes, self._stream.cuda_stream, to_host=is_save)
            arrival.record(self._stream)

    def finish(self, copies: list[BlockCopy], mapping: ArenaMapping) -> list[bytes]:
        if self._hasher is None:
            self._stream.synchronize()
            return [_hash_slot(copy, mapping, self._route.span) for copy in copies]
        firsts = np.array([copy.page for copy in copies], np.int64)[:, None] * self._page_bytes
        part_bytes, runs, bounds = self._route.span.part_bytes, self._route.runs, [0]
        # of each run the parts that are whole with it, in bytes
        lots = [(firsts + np.array(run.parts, np.int64)[None, :] * part_bytes).ravel() for run in runs]
        with self._torch.cuda.stream(self._hash_stream):
            self._hasher.put(np.concatenate(lots))
            for lot, arrival in zip(lots, self.arrivals, strict=True):
                bounds.append(bounds[-1] + len(lot))
                if len(lot):
                    if not self._route.is_save:
                        arrival.synchronize()
                    self._hasher.start(*bounds[-2:])
        self._stream.synchronize()
        self._hash_stream.synchronize()
        columns = np.split(self._hasher.finish(bounds[-1]).astype("<u8"), bounds[1:-1])
        return [row.tobytes() for row in np.concatenate([column.reshape(len(copies), -1) for column in columns], axis=1)]


def _hash_slot(copy: BlockCopy, mapping: ArenaMapping, span: Span) -> bytes:
    """xxh3-64 of the span's parts as they are in the slot, little-endian."""
    first = copy.offset + span.slot_start
    parts = mapping.data[first : first + span.num_bytes].data
    size = span.part_bytes
    hashes = [xxhash.xxh3_64_intdigest(parts[start : start + size]) for start in range(0, span.num_bytes, size)]
    return struct.pack(f"<{len(hashes)}Q", *hashes)
