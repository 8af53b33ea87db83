"""Brings blocks into the arena from the tiers below: disk, and other nodes' stores.

One `bringing` per request; one fill per block, whoever asks for it; one batch per read of a source.

    absent --somebody asks, a source has it, a slot is free--> FILLING --intact, parent visible--> in the arena
                                                                  |--not intact, or not there--> absent

Sources work on threads and write straight into the slots. A waiter leaves at its deadline; the fill goes on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from cache_store.accesses import MissReason
from cache_store.blocks import Block, BlockState
from cache_store.errands import Errands, Shape
from cache_store.leases import ReadLease
from cache_store.pricing import Ledger
from cache_store.tiers.dram import DramTier

log = logging.getLogger(__name__)

MAX_FILLING_BYTES = 1 << 30
NUM_THREADS = 4  # per source: one that is slow must not hold up another

Done = Callable[[int, bytes | None], None]  # position in the batch, checksums; None: not there, or not intact


class Source(Protocol):
    """A tier to bring blocks from."""

    name: str
    batch_bytes: int  # what one `load` is best asked for

    def find(self, keys: Sequence[bytes], layout: bytes) -> int:
        """How many leading keys it probably has. Called on the store's thread: no I/O."""
        ...

    def load(self, keys: Sequence[bytes], layout: bytes, views: Sequence[memoryview], done: Done, timeout_s: float) -> None:
        """Writes blocks into their views, on a thread of the caller's. Calls `done` for each as soon as it is known; whatever it has not
        answered when it returns or raises is not there. Ends within `timeout_s`, however the source behaves."""
        ...


@dataclass(slots=True, eq=False)
class Fill:
    block: Block
    tier: str
    arrived: asyncio.Future[bool]
    num_waiters: int = 0
    loan: ReadLease | None = None  # keeps it in the arena while somebody waits


@dataclass(slots=True)
class Brought:
    """What one request has got so far."""

    tiers: dict[bytes, str] = field(default_factory=dict)  # key -> where it came from, unless it was in the arena
    shortfall: MissReason | None = None  # why what the sources have is not all there


class Promoter:
    """Runs on the store's loop. `close` before the tiers."""

    def __init__(
        self, dram: DramTier, errands: Errands, sources: Sequence[Source], ledger: Ledger, flush: Callable[[], None], timeout_s: float
    ) -> None:
        """`flush` publishes what has changed; `timeout_s` bounds every batch."""
        self.sources = list(sources)
        self.ledger = ledger
        self._dram, self._errands, self._flush, self._timeout_s = dram, errands, flush, timeout_s
        self._fills: dict[bytes, Fill] = {}
        self._answered: list[Fill] = []  # by their sources; they wait for their parents
        self._filling_bytes = 0
        self._threads = {source.name: ThreadPoolExecutor(NUM_THREADS, f"from-{source.name}") for source in sources}
        self._loop = asyncio.get_running_loop()
        self._batches: set[asyncio.Future[None]] = set()

    def runs(self, keys: Sequence[bytes], layout: bytes) -> list[tuple[str, int]]:
        """Which tier has how many of the leading keys, in the order of the keys."""
        runs: list[tuple[str, int]] = []
        position = 0
        while position < len(keys):
            tier, count = self._best(keys[position:], layout, self.sources)
            if not count:
                break
            runs.append((tier.name, count))
            position += count
        return runs

    @contextlib.asynccontextmanager
    async def bringing(
        self, keys: Sequence[bytes], shape: Shape, deadline_s: float, block_s: float = 0.0, *, sources: Sequence[Source] | None = None
    ) -> AsyncIterator[Brought]:
        """Waits until the leading keys that any tier has are in the arena, or until `deadline_s` on the loop's clock; inside the context
        they stay there. `block_s`: what computing a block would take, 0 when nobody knows; `sources`: all of them, if not given."""
        brought = Brought()
        loans: list[ReadLease] = []
        waited: list[Fill] = []
        try:
            self._begin(keys, shape, block_s, self.sources if sources is None else sources, brought, loans, waited)
            if waited:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline_s):
                        await asyncio.wait([fill.arrived for fill in waited])
            for fill in waited:
                if not fill.arrived.done():
                    brought.shortfall = brought.shortfall or MissReason.LATE
                elif fill.arrived.result():
                    brought.tiers[fill.block.key] = fill.tier
                else:
                    brought.shortfall = brought.shortfall or MissReason.LOST
            yield brought
        finally:
            for loan in loans:
                self._errands.end_loan(loan)
            for fill in waited:
                fill.num_waiters -= 1
                if not fill.num_waiters and fill.loan is not None:
                    self._errands.end_loan(fill.loan)

    async def close(self) -> None:
        """Waits for the batches under way, each of which ends within its time."""
        self.sources = []
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        if self._batches:
            await asyncio.wait(self._batches, timeout=self._timeout_s + 1.0)
        for fill in list(self._fills.values()):
            self._answer(fill, None)

    def _best(self, keys: Sequence[bytes], layout: bytes, sources: Sequence[Source]) -> tuple[Source | DramTier, int]:
        """The first tier that has the first key; later ones cost more."""
        tiers: list[Source | DramTier] = [self._dram, *sources]
        return next(((tier, count) for tier in tiers if (count := tier.find(keys, layout))), (self._dram, 0))

    def _begin(
        self,
        keys: Sequence[bytes],
        shape: Shape,
        block_s: float,
        sources: Sequence[Source],
        brought: Brought,
        loans: list[ReadLease],
        waited: list[Fill],
    ) -> None:
        """Pins what is there, joins fills under way, and starts the others, up to the first key that nobody has."""
        position, parent = 0, None
        while position < len(keys):
            fill = self._fills.get(keys[position])
            if fill is not None:
                fill.num_waiters += 1
                waited.append(fill)
                parent = fill.block
                position += 1
                continue
            tier, count = self._best(keys[position:], shape.layout, sources)
            if isinstance(tier, DramTier):
                blocks = tier.leading(keys[position : position + count], shape.layout)
                if not blocks:
                    return
                loans.append(self._errands.lend(blocks))
            else:
                fresh = itertools.takewhile(lambda key: key not in self._fills, keys[position : position + count])
                started = self._start(tier, list(fresh), shape, parent, block_s)
                if not started:
                    brought.shortfall = MissReason.NO_SPACE
                    return
                for each in started:
                    each.num_waiters += 1
                waited += started
                blocks = [each.block for each in started]
            parent = blocks[-1]
            position += len(blocks)

    def _start(self, source: Source, keys: Sequence[bytes], shape: Shape, parent: Block | None, block_s: float) -> list[Fill]:
        """Fills for the leading keys for which there are slots, read in batches."""
        fills: list[Fill] = []
        for key in keys:
            if self._filling_bytes + shape.num_bytes > MAX_FILLING_BYTES:
                break
            block = self._errands.begin_fill(key, shape, parent)
            if block is None:
                break
            fill = self._fills[key] = Fill(block, source.name, self._loop.create_future())
            self._filling_bytes += shape.num_bytes
            fills.append(fill)
            parent = block
        size = max(1, source.batch_bytes // shape.num_bytes)
        for start in range(0, len(fills), size):
            batch = asyncio.ensure_future(self._load(source, fills[start : start + size], shape, block_s))
            self._batches.add(batch)
            batch.add_done_callback(self._batches.discard)
        return fills

    async def _load(self, source: Source, fills: list[Fill], shape: Shape, block_s: float) -> None:
        arena = self._dram.arena
        views = [arena.view(fill.block.slot.offset, shape.num_bytes) for fill in fills if fill.block.slot]
        answers: set[int] = set()
        num_good = 0

        def answer(position: int, checksums: bytes | None) -> None:
            nonlocal num_good
            if position not in answers:
                answers.add(position)
                num_good += checksums is not None
                self._answer(fills[position], checksums)

        def done(position: int, checksums: bytes | None) -> None:  # on the thread
            self._loop.call_soon_threadsafe(answer, position, checksums)

        def work() -> float:  # on the thread
            begun_s = time.monotonic()
            source.load([fill.block.key for fill in fills], shape.layout, views, done, self._timeout_s)
            return time.monotonic() - begun_s

        try:
            seconds = await self._loop.run_in_executor(self._threads[source.name], work)
            await asyncio.sleep(0)  # the last answers were posted before the end was
            self.ledger.brought(source.name, num_good * shape.num_bytes, seconds, num_good * block_s)
        except (OSError, RuntimeError) as error:
            log.warning("bringing blocks from %s failed: %s: %s", source.name, type(error).__name__, error)
        finally:
            for view in views:
                view.release()
            for position in range(len(fills)):
                answer(position, None)

    def _answer(self, fill: Fill, checksums: bytes | None) -> None:
        """A source is done with a slot. Admitting it may admit those behind it, which were done before."""
        self._errands.end_fill(fill.block, checksums)
        self._answered.append(fill)
        for each in self._answered:
            if each.block.state is not BlockState.WRITING:
                self._settle(each, arrived=each.block.state is BlockState.STORED)
        self._answered = [each for each in self._answered if not each.arrived.done()]
        self._flush()

    def _settle(self, fill: Fill, *, arrived: bool) -> None:
        del self._fills[fill.block.key]
        self._filling_bytes -= fill.block.num_bytes
        if arrived and fill.num_waiters:
            fill.loan = self._errands.lend([fill.block])
        fill.arrived.set_result(arrived)
