"""Blocks from pages into the store, in the background.

A published block waits in the queue unpinned: where its page is evicted first, the offer is dropped. A batch goes, parents first,

    RESERVING --slots--> COPYING --all copies answered--> COMMITTING --> (released)

and pins its pages only while COPYING. One batch reserves at a time and batches commit in order, so that the store always hears of parents
first. Blocks that came from the store are not offered, unless the store was lost: after every attachment all published blocks are offered,
and it says which it has. Nor are the parents of a block that it has evicted: what pages hold would push out of it what they do not.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cache_store.keys import BlockKey
from runtime.engine.block_manager import BlockManager, Published
from runtime.engine.config import EngineConfig
from runtime.engine.leases import Leases
from runtime.engine.store_port import Commit, Reserve, StoreAnswer, StorePort, StoreState
from workers.step import BlockCopy, CopyResult

if TYPE_CHECKING:
    from cache_store.client import Reserved


class BatchPhase(enum.Enum):
    RESERVING = "reserving"
    COPYING = "copying"
    COMMITTING = "committing"


@dataclass(slots=True, eq=False)
class _Offer:
    block: Published
    num_attempts: int = 0
    not_before_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Batch:
    offers: list[_Offer]
    phase: BatchPhase = BatchPhase.RESERVING
    lease_id: int = 0
    num_open: int = 0  # copies without an answer
    checksums: dict[BlockKey, bytes] = field(default_factory=dict)  # of blocks that were copied
    failed: set[BlockKey] = field(default_factory=set)


class KvOffers:
    """Owned by the engine's thread. `published` and `evicted` are the block manager's listeners."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, port: StorePort, copy_ids: Iterator[int], num_parts: int) -> None:
        """`num_parts` of one stored block."""
        self.leases = Leases(port)
        self.num_dropped = 0  # offers that ended without the block in the store
        self._config, self._blocks, self._port, self._copy_ids = config, blocks, port, copy_ids
        self._parts = range(num_parts)
        self._queue: dict[BlockKey, _Offer] = {}
        self._delayed: dict[BlockKey, _Offer] = {}
        self._busy: set[BlockKey] = set()  # in a batch: one that is published again waits, so that no block is written twice at once
        self._returning: set[int] = set()  # leases that end with unwritten slots; nothing is reserved behind those blocks meanwhile
        self._reserves: dict[int, _Batch] = {}  # at most one
        self._batches: deque[_Batch] = deque()  # reserved and not yet over, in order; only the first one commits
        self._commits: dict[int, _Batch] = {}  # at most one
        self._copies: list[BlockCopy] = []  # for the next plan
        self._open: dict[int, tuple[_Batch, _Offer, int]] = {}  # copy -> batch, offer, pinned page

    @property
    def num_pending(self) -> int:
        """Blocks queued, being reserved, copied or committed."""
        return len(self._queue) + len(self._delayed) + len(self._busy)

    def is_pending(self, key: BlockKey) -> bool:
        """Whether the block is among `num_pending`."""
        return key in self._busy or key in self._queue or key in self._delayed

    @property
    def num_open_copies(self) -> int:
        return len(self._open)

    @property
    def num_pages_only_here(self) -> int:
        """Pages that no request holds, pinned until their copy is answered."""
        return sum(1 for _, _, page in self._open.values() if self._blocks.num_pins(page) == 1)

    @property
    def next_deadline_s(self) -> float:
        return min((offer.not_before_s for offer in self._delayed.values()), default=math.inf)

    def published(self, block: Published, from_store: bool) -> None:
        if not from_store and self._port.state is StoreState.READY:
            self._queue[block.key] = _Offer(block)

    def offer_again(self, key: BlockKey) -> None:
        """Offers a block and those before it, as far as pages hold them and they are not on their way."""
        chain = []
        while (block := self._blocks.published_as(key)) is not None:
            if not self.is_pending(key):
                chain.append(block)
            key = block.parent
        for block in reversed(chain):
            self.published(block, from_store=False)

    def evicted(self, key: BlockKey) -> None:
        if self._queue.pop(key, None) or self._delayed.pop(key, None):
            self.num_dropped += 1

    def attached(self) -> None:
        """A store is there, perhaps an empty one: offers everything that is published."""
        self._delayed.clear()
        self._queue = {block.key: _Offer(block) for block in self._blocks.published()}

    def lost(self) -> None:
        """The store is gone, and its slots with it. Copies already sent are answered by the ranks all the same."""
        self.num_dropped += self.num_pending
        self._queue.clear()
        self._delayed.clear()
        self._reserves.clear()
        self._batches.clear()
        self._commits.clear()
        self._busy.clear()
        self.leases.lost()
        unsent, self._copies = self._copies, []
        for copy in unsent:
            self.copied(CopyResult(copy.copy_id, False, b"", "store lost"))

    def advance(self, now_s: float) -> None:
        """Does what can be done now: releases, offers whose wait is over, the next batch."""
        self.leases.flush()
        if self._delayed:
            for offer in [offer for offer in self._delayed.values() if offer.not_before_s <= now_s]:
                del self._delayed[offer.block.key]
                self._queue[offer.block.key] = offer
        self._returning = {lease_id for lease_id in self._returning if self.leases.holds(lease_id)}
        room = min(self._config.offer_batch_blocks, self._config.max_saving_blocks - len(self._open))
        if not self._queue or self._reserves or self._returning or room < 1:
            return
        keys = list(itertools.islice((key for key in self._queue if key not in self._busy), room))
        if not keys:
            return
        offers = [self._queue[key] for key in keys]
        parents, first = [offer.block.parent for offer in offers], [not offer.block.depth for offer in offers]
        ticket = self._port.ask(Reserve(keys, parents, first, self._config.lease_ttl_s))
        if ticket is not None:
            self._reserves[ticket] = _Batch(offers)
            self._busy.update(keys)
            for key in keys:
                del self._queue[key]

    def answered(self, answer: StoreAnswer, now_s: float) -> bool:
        """Takes the store's answer to a question that was asked here."""
        if self.leases.answered(answer.ticket):
            return True
        batch = self._reserves.pop(answer.ticket, None)
        if batch:
            self._reserved(batch, answer.reply, now_s)  # type: ignore[arg-type]  # the reply to Reserve
            return True
        batch = self._commits.pop(answer.ticket, None)
        if batch:
            self._release(self._batches.popleft())
            self._commit_next()
            return True
        return False

    def take_copies(self) -> list[BlockCopy]:
        copies, self._copies = self._copies, []
        return copies

    def copied(self, result: CopyResult) -> bool:
        """Takes the result of a copy that was asked for here."""
        opened = self._open.pop(result.copy_id, None)
        if opened is None:
            return False
        batch, offer, page = opened
        self._blocks.unpin([page])
        if result.ok:
            batch.checksums[offer.block.key] = result.checksums
        else:
            batch.failed.add(offer.block.key)
        batch.num_open -= 1
        self._commit_next()
        return True

    def _reserved(self, batch: _Batch, reserved: Reserved | None, now_s: float) -> None:
        from cache_store.client import ReserveOutcome

        if reserved is None:
            self.num_dropped += len(batch.offers)
            self._release(batch)
            return
        batch.phase = BatchPhase.COPYING
        if reserved.lease_id:
            batch.lease_id = reserved.lease_id
            self.leases.add(reserved.lease_id, sum(slot.outcome is ReserveOutcome.RESERVED for slot in reserved.slots))
        for offer, slot in zip(batch.offers, reserved.slots, strict=True):
            if slot.outcome is ReserveOutcome.RESERVED:
                self._copy(batch, offer, slot.offset, slot.generation, now_s)
            elif slot.outcome in (ReserveOutcome.WRITTEN_ELSEWHERE, ReserveOutcome.NO_PARENT):
                self._try_later(offer, now_s)
            elif slot.outcome is not ReserveOutcome.STORED:
                self.num_dropped += 1
        self._batches.append(batch)
        self._commit_next()

    def _copy(self, batch: _Batch, offer: _Offer, offset: int, generation: int, now_s: float) -> None:
        key = offer.block.key
        page = self._blocks.page_of(key)
        if page is None or offer.block.parent in batch.failed:
            batch.failed.add(key)  # evicted meanwhile; its slot returns with the lease
            self.num_dropped += 1
            return
        self._blocks.pin(page)
        copy_id = next(self._copy_ids)
        self._copies.append(BlockCopy(copy_id, page, offset, generation, now_s + self._config.copy_timeout_s, b""))
        self._open[copy_id] = (batch, offer, page)
        batch.num_open += 1

    def _try_later(self, offer: _Offer, now_s: float) -> None:
        """Another engine is writing the block or its parent: by then it is stored, or that engine has given up."""
        offer.num_attempts += 1
        if offer.num_attempts >= self._config.max_offer_attempts or self._blocks.page_of(offer.block.key) is None:
            self.num_dropped += 1
            return
        offer.not_before_s = now_s + self._config.offer_retry_s * offer.num_attempts
        self._delayed[offer.block.key] = offer

    def _commit_next(self) -> None:
        """Commits the first batch once its copies are answered; one without anything to commit is over."""
        while self._batches and not self._batches[0].num_open and not self._commits:
            batch = self._batches[0]
            blocks = self._committable(batch)
            ticket = self._port.ask(Commit(batch.lease_id, blocks)) if blocks else None
            if ticket is None:
                batch.failed.update(key for key, _, _ in blocks)
                self.num_dropped += len(blocks)
                self._release(self._batches.popleft())
            else:
                batch.phase = BatchPhase.COMMITTING
                self._commits[ticket] = batch

    def _committable(self, batch: _Batch) -> list[tuple[BlockKey, Sequence[int], bytes]]:
        """Blocks whose copy arrived, but none behind one that did not."""
        blocks: list[tuple[BlockKey, Sequence[int], bytes]] = []
        for offer in batch.offers:
            key = offer.block.key
            if offer.block.parent in batch.failed:
                batch.failed.add(key)
            elif key in batch.checksums:
                blocks.append((key, self._parts, batch.checksums[key]))
        self.num_dropped += len(batch.checksums) - len(blocks)
        return blocks

    def _release(self, batch: _Batch) -> None:
        """The batch is over; slots that were not committed return with the lease, and nothing behind those blocks is worth keeping."""
        for later in (*self._batches, *self._reserves.values()):
            later.failed |= batch.failed
        self._busy.difference_update(offer.block.key for offer in batch.offers)
        if batch.lease_id:
            if batch.failed:
                self._returning.add(batch.lease_id)
            self.leases.release(batch.lease_id)
            self.leases.flush()
