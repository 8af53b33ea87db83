"""Blocks on their way from the store into pages: a job per read, a piece per acquire, a copy per block.

A job has its pages from the start and reads piece by piece, each acquired while the one before is copied, as long as no more blocks than
`max_loading_blocks` are under way in all. Blocks are published, and held for the request, as their copies are answered: when the last one
is, little is left to do.

Where little is left to copy, a request may go on ahead: it gets all pages, and its step waits on the ranks for what is under way. Should
a copy fail then, the results of that row are void, and the request starts again.

A job outlives its request: its pages and its leases return only when every copy is answered. No two jobs read the same block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from cache_store.keys import BlockKey
from runtime.engine.block_manager import BlockManager, Published
from runtime.engine.config import EngineConfig
from runtime.engine.leases import Leases
from runtime.engine.live import LiveRequest, Phase
from runtime.engine.load_state import Job, LoadPhase, Piece, Wait
from runtime.engine.store_port import Acquire, StoreAnswer, StorePort
from workers.step import BlockCopy, CopyResult

if TYPE_CHECKING:
    from cache_store.client import Acquired


class LoadJobs:
    """Part of KvLoads."""

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        port: StorePort,
        copy_ids: Iterator[int],
        block_bytes: int,
        leases: Leases,
        on_end: Callable[[Job, float], None],
    ) -> None:
        """`on_end(job, now_s)` is called when a job whose request still waits is over."""
        self.num_failed = 0  # copies that did not deliver
        self._config, self._blocks, self._port, self._copy_ids = config, blocks, port, copy_ids
        self._block_bytes, self._leases, self._on_end = block_bytes, leases, on_end
        self._acquires: dict[int, Job] = {}
        self._copies: list[BlockCopy] = []  # for the next plan
        self._open: dict[int, tuple[Piece, int]] = {}  # copy -> its piece and position in the job
        self._jobs: set[Job] = set()
        self._loading: set[BlockKey] = set()  # by these
        self._void: list[LiveRequest] = []
        self._starved: dict[Job, None] = {}  # jobs that would acquire more, were fewer blocks under way; in their order

    @property
    def num_open_copies(self) -> int:
        return len(self._open)

    def is_reading(self, key: BlockKey) -> bool:
        return key in self._loading

    def free(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """The leading ones that nobody is reading."""
        return list(itertools.takewhile(lambda key: key not in self._loading, keys))

    def begin(self, wait: Wait, first: int, keys: list[BlockKey], parent: BlockKey, pinned: Acquired | None, now_s: float) -> None:
        """Reads `keys`, the blocks of a request from depth `first` on. `pinned`: what its lookup has acquired of them."""
        job = Job(wait, first, keys, [parent, *keys[:-1]], self._blocks.allocate(len(keys)))
        self._jobs.add(job)
        self._loading.update(keys)
        wait.phase = LoadPhase.LOADING
        if pinned is None:
            self._proceed(job, now_s)
        else:
            job.num_asked = min(len(keys), len(pinned.slots))
            self._acquired(job, pinned, now_s)

    def go_ahead(self, wait: Wait, max_bytes: float) -> bool:
        """Gives a request all pages of its job, if every copy has been sent and no more than `max_bytes` are under way."""
        request, job = wait.request, next((job for job in self._jobs if job.wait is wait), None)
        if job is None or job.is_acquiring or job.is_cut or len(job.good) < len(job.keys):
            return False
        if not 0 < len(self._open) * self._block_bytes <= max_bytes:
            return False
        if job.first + len(job.keys) < wait.num_found or len(request.held_pages) != job.first + job.num_handed:
            return False  # more is to be read, or others have needed the pages more
        for position in range(job.num_handed, len(job.keys)):
            self._blocks.pin(job.pages[position])  # the job holds it too, until the copy is answered
            request.held_pages.append(job.pages[position])
        for position in range(job.num_published, len(job.keys)):
            self._note_tier(request, job, position)
        job.wait, job.ahead = None, request
        return True

    def take_void(self) -> list[LiveRequest]:
        """Requests whose rows have read pages that turned out bad."""
        void, self._void = self._void, []
        return void

    def forsake(self, wait: Wait) -> None:
        """The request goes on without what is being read for it."""
        for job in [job for job in self._jobs if job.wait is wait]:
            job.wait = None
            if job in self._starved:
                self._proceed(job, math.inf)

    def answered(self, answer: StoreAnswer, now_s: float) -> bool:
        """Takes the store's answer to a question that was asked here."""
        job = self._acquires.pop(answer.ticket, None)
        if job is None:
            return False
        job.is_acquiring = False
        acquired: Acquired | None = answer.reply  # type: ignore[assignment]  # the reply to Acquire
        if acquired is not None and acquired.lease_id:
            self._leases.add(acquired.lease_id, len(acquired.slots))
        self._acquired(job, acquired, now_s)
        return True

    def take_copies(self) -> list[BlockCopy]:
        copies, self._copies = self._copies, []
        return copies

    def copied(self, result: CopyResult, now_s: float) -> bool:
        """Takes the result of a copy that was asked for here."""
        opened = self._open.pop(result.copy_id, None)
        if opened is None:
            return False
        piece, position = opened
        job = piece.job
        job.good[position] = result.ok
        if not result.ok:
            self.num_failed += 1
            job.is_cut = job.is_failed = True
            self._take_back(job)
        elif position == job.num_published:
            self._publish(job)
        piece.num_open -= 1
        if not piece.num_open:
            self._leases.release(piece.lease_id)
            job.num_open -= 1
            self._proceed_after(job, now_s)
        return True

    def drop_unsent(self, now_s: float) -> None:
        """The store is gone. Copies already sent are answered by the ranks all the same."""
        unsent, self._copies = self._copies, []
        for copy in unsent:
            self.copied(CopyResult(copy.copy_id, False, b"", "store lost"), now_s)

    def _proceed_after(self, job: Job, now_s: float) -> None:
        """Something of the job was answered: it may go on, and others where there is room now."""
        self._proceed(job, now_s)
        for starved in list(self._starved):
            self._proceed(starved, now_s)

    def _proceed(self, job: Job, now_s: float) -> None:
        """Acquires the next piece, up to twice as large as the one before; where there is none, the job is over with its last copy."""
        start = len(job.good)
        self._starved.pop(job, None)
        if not (job.is_acquiring or job.is_cut) and job.wait is not None and start < len(job.keys):
            room = self._config.max_loading_blocks - self._num_under_way
            job.num_asked = min(len(job.keys), 2 * start + self._config.first_load_blocks, start + room)
            if room <= 0:
                self._starved[job] = None
            elif (ticket := self._port.ask(Acquire(job.keys[start : job.num_asked], self._config.lease_ttl_s))) is None:
                job.is_cut = job.is_failed = True
            else:
                job.is_acquiring = True
                self._acquires[ticket] = job
        if not (job.is_acquiring or job.num_open or job in self._starved):
            self._finish(job, now_s)

    @property
    def _num_under_way(self) -> int:
        """Blocks that are acquired, or being acquired, and whose copies have no answer yet."""
        return len(self._open) + sum(job.num_asked - len(job.good) for job in self._acquires.values())

    def _acquired(self, job: Job, acquired: Acquired | None, now_s: float) -> None:
        """Slots are pinned: copies for the next plan."""
        if acquired is None:
            job.is_cut = job.is_failed = True
        else:
            piece = Piece(job, acquired.lease_id)
            if job.wait is not None and not job.is_cut:
                self._copy(piece, acquired, now_s)
            if piece.num_open:
                job.num_open += 1
            else:
                self._leases.release(piece.lease_id)
            self._publish(job)
        self._proceed_after(job, now_s)

    def _copy(self, piece: Piece, acquired: Acquired, now_s: float) -> None:
        blocks, job = self._blocks, piece.job
        deadline_s = now_s + self._config.copy_timeout_s
        start = len(job.good)
        tiers = [tier for tier, count in acquired.tier_runs for _ in range(count)]
        found = zip(job.keys[start : job.num_asked], acquired.slots, tiers, strict=False)
        for position, (key, slot, tier) in enumerate(found, start):
            page = blocks.page_of(key)
            if page is None:
                copy_id = next(self._copy_ids)
                self._copies.append(BlockCopy(copy_id, job.pages[position], slot.offset, slot.generation, deadline_s, slot.checksums))
                self._open[copy_id] = (piece, position)
            else:
                self._use_instead(job, position, page)
            job.good.append(page is not None)
            job.tiers.append(tier if page is None else "")
        piece.num_open = len(job.good) - start - sum(job.good[start:])
        job.is_cut = len(job.good) < job.num_asked  # blocks were evicted since they were found, or a tier is slow or full
        job.is_failed |= acquired.shortfall in ("late", "no_space")

    def _publish(self, job: Job) -> None:
        """The good leading blocks are there for everybody, and the request holds them."""
        blocks, wait = self._blocks, job.wait
        for position in range(job.num_published, len(job.good)):
            if not job.good[position]:
                return
            key, tier, depth = job.keys[position], job.tiers[position], job.first + position
            if tier and not blocks.publish(job.pages[position], Published(key, job.parents[position], depth), from_store=True):
                page = blocks.page_of(key)
                assert page is not None
                self._use_instead(job, position, page)
            job.num_published += 1
            if wait is None:
                continue
            self._note_tier(wait.request, job, position)
            if job.num_handed == position and len(wait.request.held_pages) == depth:  # else others have needed the pages more
                wait.request.held_pages.append(job.pages[position])
                job.num_handed += 1

    def _note_tier(self, request: LiveRequest, job: Job, position: int) -> None:
        if tier := job.tiers[position]:
            request.load_tiers[job.first + position] = tier
            request.bytes_loaded += self._block_bytes

    def _take_back(self, job: Job) -> None:
        """From a request that went on ahead. What its row has in flight counts for nothing; where it has no row yet, it keeps the pages
        that are known to be good."""
        request, job.ahead = job.ahead, None
        if request is None:
            return
        request.num_void = request.num_in_flight
        if not request.first_output_sent:
            request.cached = request.receipt = None  # told once it is admitted again
        if request.phase is Phase.RUNNING:
            self._void.append(request)
        num_good = job.first + job.num_published
        self._blocks.unpin(request.held_pages[num_good:])
        del request.held_pages[num_good:]

    def _use_instead(self, job: Job, position: int, page: int) -> None:
        """A row has computed the block meanwhile, into `page`."""
        self._blocks.pin(page)
        self._blocks.unpin([job.pages[position]])
        job.pages[position] = page

    def _finish(self, job: Job, now_s: float) -> None:
        """Every copy is answered: the request goes on."""
        self._jobs.remove(job)
        self._loading.difference_update(job.keys)
        self._blocks.unpin(job.pages[job.num_handed :])
        if job.wait is not None:
            self._on_end(job, now_s)

    def check(self) -> list[str]:
        """Every violated invariant, in words; empty when all is well."""
        problems = []
        if sum(len(job.keys) for job in self._jobs) != len(self._loading):
            problems.append(f"{len(self._loading)} blocks are marked as being read, but jobs have others")
        pieces = {piece for piece, _ in self._open.values()}
        if sum(piece.num_open for piece in pieces) != len(self._open):
            problems.append(f"{len(self._open)} copies are open, but pieces count others")
        for job in self._jobs:
            if job.num_open != sum(piece.job is job for piece in pieces) or job.is_acquiring != (job in self._acquires.values()):
                problems.append(
                    f"a job has {job.num_open} open pieces and is {'' if job.is_acquiring else 'not '}acquiring, which is not so"
                )
            if not (job.num_open or job.is_acquiring or job in self._starved):
                problems.append("a job has nothing to wait for")
        if self._starved and not self._num_under_way:
            problems.append("jobs wait for copies, but none is under way")
        return problems
