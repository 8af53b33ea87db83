"""Blocks on their way into the store, phase by phase, with the store's answers given by hand."""

from __future__ import annotations

import itertools

from engine_parts import Bench, ScriptedPort

from cache_store.client import CommitOutcome, Reserved, ReservedSlot, ReserveOutcome
from runtime.engine.kv_offers import KvOffers
from runtime.engine.store_port import Commit, Release, Reserve, StoreAnswer, StoreState
from workers.step import BlockCopy, CopyResult

RESERVED, STORED = ReserveOutcome.RESERVED, ReserveOutcome.STORED
NUM_PARTS = 2


class OfferBench(Bench):
    def __init__(self, **config: object) -> None:
        num_pages = config.pop("num_pages", 40)
        super().__init__(num_pages=num_pages, max_num_batched_tokens=64, **config)  # type: ignore[arg-type]
        self.port = ScriptedPort()
        self.offers = KvOffers(self.config, self.blocks, self.port, itertools.count(1), NUM_PARTS)
        self.blocks.on_publish, self.blocks.on_evict = self.offers.published, self.offers.evicted
        self.now_s = 10.0
        self.copies: list[BlockCopy] = []

    def compute(self, name: str, num_tokens: int) -> None:
        """A request that comes and goes, and leaves its blocks in pages."""
        self.add(name, num_tokens, max_tokens=1)
        self.step()
        self.advance()

    def advance(self) -> None:
        self.offers.advance(self.now_s)
        self.copies += self.offers.take_copies()

    def answer(self, kind: type, reply: object) -> object:
        ticket, question = self.port.take(kind)
        assert self.offers.answered(StoreAnswer(ticket, reply), self.now_s)  # type: ignore[arg-type]
        self.advance()
        return question

    def reserve(self, *outcomes: ReserveOutcome, lease_id: int = 3) -> object:
        slots = [ReservedSlot(outcome, 256 * i, 9) for i, outcome in enumerate(outcomes)]
        return self.answer(Reserve, Reserved(lease_id if RESERVED in outcomes else 0, slots))

    def finish_copies(self, *failed: int) -> None:
        copies, self.copies = self.copies, []
        for i, copy in enumerate(copies):
            assert self.offers.copied(CopyResult(copy.copy_id, i not in failed, b"sum%d" % i))
        self.advance()


def test_new_blocks_are_reserved_copied_committed_released() -> None:
    bench = OfferBench()
    bench.compute("a", 9)
    keys = [block.key for block in bench.blocks.published()]
    assert len(keys) == 2
    assert bench.offers.num_pending == 2
    question = bench.reserve(RESERVED, RESERVED)
    assert isinstance(question, Reserve)
    assert question.keys == keys
    assert question.parents[1] == keys[0]
    assert question.first == [True, False]
    assert [(copy.page, copy.offset, copy.generation) for copy in bench.copies] == [
        (bench.blocks.page_of(key), 256 * i, 9) for i, key in enumerate(keys)
    ]
    assert bench.blocks.num_used == bench.offers.num_pages_only_here == 2
    assert bench.offers.leases.num_slots == 2
    bench.finish_copies()
    assert bench.blocks.num_used == 0
    question = bench.answer(Commit, [CommitOutcome.COMMITTED] * 2)
    assert question == Commit(3, [(keys[0], range(NUM_PARTS), b"sum0"), (keys[1], range(NUM_PARTS), b"sum1")])
    assert bench.answer(Release, 1) == Release([3])
    assert bench.offers.num_pending == bench.offers.leases.num_slots == 0


def test_what_the_store_has_is_not_written() -> None:
    bench = OfferBench()
    bench.compute("a", 9)
    bench.reserve(STORED, RESERVED)
    assert len(bench.copies) == 1
    bench.finish_copies()
    question = bench.answer(Commit, [CommitOutcome.COMMITTED])
    assert isinstance(question, Commit)
    assert len(question.blocks) == 1


def test_nothing_to_write_leaves_no_lease() -> None:
    bench = OfferBench()
    bench.compute("a", 9)
    bench.reserve(STORED, STORED)
    assert bench.port.asked == []
    assert bench.offers.num_pending == 0


def test_an_evicted_page_drops_its_offer() -> None:
    bench = OfferBench(num_pages=6)
    bench.port.state = StoreState.READY
    bench.offers.advance = lambda now_s: None  # type: ignore[method-assign]  # the store is slow to be asked
    bench.compute("a", 9)
    assert bench.offers.num_pending == 2
    bench.compute("b", 17)
    assert bench.offers.num_dropped == 2
    assert bench.offers.num_pending == 4


def test_a_page_evicted_while_the_store_reserves_gives_its_slot_back() -> None:
    bench = OfferBench(num_pages=6)
    bench.compute("a", 9)
    bench.blocks.unpin(bench.blocks.allocate(5))
    bench.reserve(RESERVED, RESERVED)
    assert bench.copies == []
    assert bench.port.take(Release)[1] == Release([3])
    assert bench.offers.num_pending == 0
    assert bench.offers.num_dropped == 2


def test_nothing_is_committed_behind_a_copy_that_failed() -> None:
    bench = OfferBench()
    bench.compute("a", 13)
    keys = [block.key for block in bench.blocks.published()]
    bench.reserve(RESERVED, RESERVED, RESERVED)
    bench.finish_copies(1)
    question = bench.answer(Commit, [CommitOutcome.COMMITTED])
    assert isinstance(question, Commit)
    assert [key for key, _, _ in question.blocks] == keys[:1]
    assert bench.port.take(Release)[1] == Release([3])


def test_nothing_is_committed_behind_blocks_that_the_store_could_not_be_asked_about() -> None:
    bench = OfferBench(offer_batch_blocks=1)
    bench.compute("a", 9)
    bench.reserve(RESERVED, lease_id=3)
    bench.reserve(RESERVED, lease_id=4)
    bench.port.is_full = True
    bench.finish_copies()
    bench.port.is_full = False
    bench.advance()
    assert bench.port.take(Release)[1] == Release([3, 4])
    assert bench.port.asked == []
    assert bench.offers.num_dropped == 2
    assert bench.offers.num_pending == 0


def test_batches_are_bounded_and_commit_in_order() -> None:
    bench = OfferBench(offer_batch_blocks=2, max_saving_blocks=3)
    bench.compute("a", 21)
    bench.reserve(RESERVED, RESERVED, lease_id=3)
    bench.reserve(RESERVED, lease_id=4)
    assert bench.port.asked == [], "three pages are pinned: no more"
    assert len(bench.copies) == 3
    first, second, third = bench.copies
    bench.offers.copied(CopyResult(third.copy_id, True, b"z"))
    bench.offers.copied(CopyResult(first.copy_id, True, b"x"))
    assert bench.port.asked == [], "the second batch waits for the first"
    bench.offers.copied(CopyResult(second.copy_id, True, b"y"))
    assert [(question.lease_id, len(question.blocks)) for _, question in bench.port.asked if isinstance(question, Commit)] == [(3, 2)]
    bench.answer(Commit, [CommitOutcome.COMMITTED] * 2)
    kinds = [type(question) for _, question in bench.port.asked]
    assert kinds == [Release, Commit, Reserve]


def test_a_block_written_elsewhere_is_offered_again_later() -> None:
    bench = OfferBench(offer_retry_s=0.5, max_offer_attempts=3)
    bench.compute("a", 9)
    for attempt in (1, 2):
        bench.reserve(ReserveOutcome.WRITTEN_ELSEWHERE, ReserveOutcome.NO_PARENT)
        assert bench.port.asked == []
        assert bench.offers.num_pending == 2
        assert bench.offers.next_deadline_s == bench.now_s + 0.5 * attempt
        bench.now_s = bench.offers.next_deadline_s
        bench.advance()
    bench.reserve(ReserveOutcome.WRITTEN_ELSEWHERE, ReserveOutcome.NO_PARENT)
    assert bench.offers.num_pending == 0
    assert bench.offers.num_dropped == 2


def test_offered_again_with_all_before_it_parents_first() -> None:
    bench = OfferBench()
    bench.compute("a", 13)
    keys = [block.key for block in bench.blocks.published()]
    bench.reserve(STORED, STORED, STORED)
    bench.offers.offer_again(keys[1])
    bench.offers.offer_again(keys[2])
    bench.advance()
    again = bench.reserve(RESERVED, RESERVED, RESERVED)
    assert isinstance(again, Reserve)
    assert again.keys == keys
    assert len(bench.copies) == 3


def test_a_full_store_drops_the_offer() -> None:
    bench = OfferBench()
    bench.compute("a", 9)
    bench.reserve(RESERVED, ReserveOutcome.NO_SPACE)
    assert bench.offers.num_dropped == 1
    assert len(bench.copies) == 1


def test_a_store_that_fails_drops_the_offer() -> None:
    bench = OfferBench()
    bench.compute("a", 9)
    bench.answer(Reserve, None)
    assert bench.offers.num_pending == 0
    assert bench.offers.num_dropped == 2
    assert bench.blocks.num_used == 0


def test_without_a_store_nothing_waits() -> None:
    bench = OfferBench()
    bench.port.state = StoreState.CONNECTING
    bench.compute("a", 9)
    assert bench.offers.num_pending == 0


def test_a_restarted_store_is_offered_everything_again_parents_first() -> None:
    bench = OfferBench()
    bench.compute("a", 9)
    bench.reserve(RESERVED, RESERVED)
    sent = list(bench.copies)
    bench.port.state = StoreState.LOST
    bench.offers.lost()
    assert bench.offers.num_pending == bench.offers.leases.num_slots == 0
    assert bench.offers.num_open_copies == 2, "the ranks still read these pages"
    bench.compute("b", 9)
    bench.port.state = StoreState.READY
    bench.offers.attached()
    assert bench.offers.num_pending == 4
    for copy in sent:
        bench.offers.copied(CopyResult(copy.copy_id, True, b"old"))
    bench.advance()
    assert bench.offers.num_open_copies == 0
    _, question = bench.port.take(Reserve)
    assert isinstance(question, Reserve)
    assert sorted(question.keys) == sorted(block.key for block in bench.blocks.published())
    assert question.first == [True, True, False, False]


def test_copies_that_were_not_sent_are_dropped_with_the_store() -> None:
    bench = OfferBench()
    bench.compute("a", 9)
    ticket, _ = bench.port.take(Reserve)
    slots = [ReservedSlot(RESERVED, 0, 1), ReservedSlot(RESERVED, 256, 1)]
    bench.offers.answered(StoreAnswer(ticket, Reserved(3, slots)), bench.now_s)
    assert bench.blocks.num_used == 2
    bench.port.state = StoreState.LOST
    bench.offers.lost()
    assert bench.offers.take_copies() == []
    assert bench.blocks.num_used == bench.offers.num_open_copies == 0


def test_a_block_that_is_published_again_waits_for_its_first_offer() -> None:
    bench = OfferBench(num_pages=6)
    bench.compute("a", 9)
    bench.blocks.unpin(bench.blocks.allocate(5))  # evicted while the store reserves
    bench.compute("a", 9)
    assert len(bench.port.asked) == 1
    ticket, question = bench.port.take(Reserve)
    assert isinstance(question, Reserve)
    slots = [ReservedSlot(RESERVED, 256 * i, 9) for i in range(2)]
    bench.offers.answered(StoreAnswer(ticket, Reserved(3, slots)), bench.now_s)
    bench.advance()
    assert len(bench.copies) == 2, "the new pages hold the same blocks"
    assert bench.port.asked == []
