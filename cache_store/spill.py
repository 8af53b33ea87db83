"""Copies what becomes visible in the arena to disk, behind the writers' backs, so that an eviction loses nothing and costs nothing.

    stored in DRAM -> queued -> pinned, written on the spiller's thread, parents first -> on disk too
                        |--evicted before its turn: lost, and counted

Every block would be written once anyhow, at its eviction; writing it at once also saves it from the end of the store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor

from cache_store.blocks import Block, BlockState
from cache_store.errands import Errands
from cache_store.leases import ReadLease
from cache_store.tiers.base import TierBlock
from cache_store.tiers.disk import DiskTier
from cache_store.tiers.dram import DramTier

log = logging.getLogger(__name__)

MAX_BATCH_BYTES = 8 << 20
MAX_PINNED_SHARE = 0.125  # of the arena, by one batch
MAX_QUEUED = 1 << 20

Post = Callable[[Callable[[], None]], object]


class Spiller:
    """Runs on the store's thread, but for the writing. `close` before the tiers."""

    def __init__(self, dram: DramTier, disk: DiskTier, errands: Errands, post: Post) -> None:
        """`post(function)` has a function called on the store's thread."""
        self.num_written = self.num_lost = self.written_bytes = 0
        self._dram, self._disk, self._errands, self._post = dram, disk, errands, post
        self._queue: dict[bytes, None] = {}  # in the order of storing
        self._writer = ThreadPoolExecutor(1, "spill")
        self._loan: ReadLease | None = None  # of the batch being written
        self._closed = False

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def stored(self, key: bytes) -> None:
        """A block became visible."""
        if len(self._queue) < MAX_QUEUED:
            self._queue[key] = None
        else:
            self.num_lost += 1

    def removed(self, key: bytes) -> None:
        """A block left the arena."""
        if key in self._queue:
            del self._queue[key]
            self.num_lost += 1

    def advance(self) -> None:
        """Starts the next batch, if none is under way."""
        if self._loan is not None or self._closed or not self._disk.is_restored:
            return
        batch: dict[Block, None] = {}
        num_bytes = 0
        limit = min(MAX_BATCH_BYTES, int(MAX_PINNED_SHARE * self._dram.arena.num_bytes))
        while self._queue and num_bytes < limit:
            key = next(iter(self._queue))
            del self._queue[key]
            block = self._dram.index.get(key)
            if block is not None and block.state is BlockState.STORED and not self._disk.find([key], block.layout):
                missing = self._missing_chain(block, batch)
                batch.update(dict.fromkeys(missing))
                num_bytes += sum(each.num_bytes for each in missing)
        if batch:
            self._loan = self._errands.lend(list(batch))
            places = [(block.slot.offset, block.num_bytes) for block in batch if block.slot]
            pending = self._writer.submit(self._write, [_as_tier_block(block) for block in batch], places)
            pending.add_done_callback(self._finished)

    def close(self) -> None:
        """Ends after the batch under way."""
        self._closed = True
        self._writer.shutdown(wait=True)
        if self._loan is not None:
            self._errands.end_loan(self._loan)
            self._loan = None

    def _missing_chain(self, block: Block, batch: Container[Block]) -> list[Block]:
        """A block and those of its ancestors that are neither on disk nor in the batch, first to last."""
        chain = [] if block in batch else [block]
        while chain and (parent := chain[-1].parent) is not None and parent not in batch:
            if self._disk.find([parent.key], parent.layout):
                break
            chain.append(parent)
        return chain[::-1]

    def _write(self, blocks: list[TierBlock], places: list[tuple[int, int]]) -> int:
        """On the thread. How many are on disk now."""
        num_written = 0
        for block, place in zip(blocks, places, strict=True):
            with self._dram.arena.view(*place) as data:
                if self._disk.can_hold(len(data)) and self._disk.write(block._replace(data=data)):
                    num_written += 1
                    self.written_bytes += len(data)
        return num_written

    def _finished(self, pending: Future[int]) -> None:
        """On the thread, or on the store's when the batch was never begun."""
        if not self._closed:
            self._post(lambda: self._settle(pending))

    def _settle(self, pending: Future[int]) -> None:
        if self._loan is not None:
            self._errands.end_loan(self._loan)
            self._loan = None
        error = pending.exception()
        if error is None:
            self.num_written += pending.result()
        else:
            log.error("spilling failed: %s: %s", type(error).__name__, error)
        self.advance()


def _as_tier_block(block: Block) -> TierBlock:
    """Without its bytes."""
    parent = block.parent.key if block.parent else None
    return TierBlock(block.key, parent, block.layout, block.checksums.tobytes(), b"")
