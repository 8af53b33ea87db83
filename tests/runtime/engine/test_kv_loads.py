"""One request's wait for the store, phase by phase, with the store's answers given by hand."""

from __future__ import annotations

import itertools

import pytest
from engine_parts import BLOCK_SIZE, ROOT, Bench, ScriptedPort, make_request

from cache_store.accesses import MissReason
from cache_store.client import Acquired, ClaimOutcome, Found, Slot
from cache_store.keys import BlockKey, chain_keys
from runtime.engine.block_manager import Published
from runtime.engine.config import EngineConfig
from runtime.engine.kv_loads import KvLoads
from runtime.engine.live import LiveRequest, LoadGate
from runtime.engine.rates import ReplicaRates
from runtime.engine.store_port import Acquire, Claim, Lookup, Release, StoreAnswer, StoreState
from runtime.request import CachedTokens
from workers.step import BlockCopy, CopyResult

PROMPT = list(range(100, 118))  # four full blocks and two tokens


class LoadBench(Bench):
    def __init__(self, **config: object) -> None:
        num_pages = config.pop("num_pages", 40)
        super().__init__(num_pages=num_pages, load_timeout_s=2.0, **config)  # type: ignore[arg-type]
        self.port = ScriptedPort()
        self.rates = ReplicaRates()
        self.loads = KvLoads(self.config, self.blocks, self.port, itertools.count(1), block_bytes=100, rates=self.rates)
        self.now_s = 10.0
        self.copies: list[BlockCopy] = []
        self.claim_outcome = ClaimOutcome.GRANTED
        self.claimed: list[list[BlockKey]] = []  # by lookups

    def arrive(self, name: str = "a", prompt: list[int] = PROMPT, *, is_alone: bool = False) -> LiveRequest:
        live = self.add(name, prompt)
        self.loads.arrived(live, is_alone=is_alone)
        self.advance()
        return live

    def advance(self) -> None:
        self.loads.advance(self.scheduler, self.now_s)
        self.copies += self.loads.jobs.take_copies()

    def answer(self, kind: type, reply: object) -> object:
        ticket, question = self.port.take(kind)
        assert self.loads.answered(StoreAnswer(ticket, reply), self.now_s)  # type: ignore[arg-type]
        self.advance()
        return question

    def find(self, count: int, num_pinned: int = 0) -> list[BlockKey]:
        """`num_pinned` of them are acquired at once, under lease 4. -> the keys asked for"""
        (question,) = [each for _, each in self.port.asked if isinstance(each, Lookup)][:1]
        missing = question.keys[count:]
        claims: list[ClaimOutcome] = []
        if question.claim_ttl_s and (len(missing) >= question.min_claimed or not count):
            claims = [self.claim_outcome] * len(missing)
            self.claimed.append(missing)
        pinned = acquired(num_pinned, lease_id=4) if num_pinned else None
        self.answer(Lookup, Found(count, [("dram", count)], pinned=pinned, claims=claims))
        return question.keys

    def given_up(self) -> list[set[BlockKey]]:
        claims = [each for _, each in self.port.asked if isinstance(each, Claim)]
        assert all(claim.ttl_s <= 0.001 for claim in claims)
        return [set(claim.keys) for claim in claims]

    def grant(self, count: int, lease_id: int = 5, tier: str = "dram") -> object:
        return self.answer(Acquire, acquired(count, lease_id, tier))

    def finish_copies(self, *failed: int, count: int | None = None) -> None:
        """The oldest ones, or all."""
        copies, self.copies = self.copies[:count], self.copies[len(self.copies) if count is None else count :]
        for i, copy in enumerate(copies):
            assert self.loads.jobs.copied(CopyResult(copy.copy_id, i not in failed, b""), self.now_s)
        self.advance()

    def released(self) -> list[int]:
        """Leases that were given back since; the store confirms."""
        leases = []
        for ticket, question in [(ticket, each) for ticket, each in self.port.asked if isinstance(each, Release)]:
            self.port.asked.remove((ticket, question))
            leases += question.lease_ids
            assert self.loads.answered(StoreAnswer(ticket, len(question.lease_ids)), self.now_s)
        return leases

    def settled(self) -> None:
        assert self.loads.check() == []
        assert self.loads.jobs.num_open_copies == 0
        assert self.blocks.check() == []


def acquired(count: int, lease_id: int = 5, tier: str = "dram") -> Acquired:
    slots = [Slot(256 * i, 7, b"sum%d" % i) for i in range(count)]
    return Acquired(lease_id if count else 0, slots, [(tier, count)] if count else [])


def test_a_prefix_in_the_store_is_loaded_before_admission() -> None:
    bench = LoadBench()
    live = bench.arrive()
    assert live.load_gate is LoadGate.WAIT
    assert bench.plan() is None
    keys = chain_keys(ROOT, PROMPT, BLOCK_SIZE)
    assert bench.find(3) == keys
    question = bench.grant(3)
    assert isinstance(question, Acquire)
    assert question.keys == keys[:3]
    assert [(copy.offset, copy.generation, copy.checksums) for copy in bench.copies] == [
        (0, 7, b"sum0"),
        (256, 7, b"sum1"),
        (512, 7, b"sum2"),
    ]
    assert {copy.deadline_s for copy in bench.copies} == {bench.now_s + bench.config.copy_timeout_s}
    assert bench.loads.leases.num_slots == 3
    pages = [copy.page for copy in bench.copies]
    bench.finish_copies()
    assert bench.port.take(Release)[1] == Release([5])
    assert live.load_gate is LoadGate.OPEN
    assert live.held_pages == pages
    assert bench.plan() == {"a": 6}
    assert bench.launched[0].plan.rows_in[0].pages[:3] == pages
    assert live.cached is not None
    assert live.cached._asdict() == {"pages": 0, "dram": 12, "disk": 0, "peer": 0}
    bench.settled()


def test_the_lease_counts_until_the_store_confirms_its_end() -> None:
    bench = LoadBench()
    bench.arrive()
    bench.find(2)
    bench.grant(2)
    bench.finish_copies()
    assert bench.loads.leases.num_slots == 2
    bench.answer(Release, 1)
    assert bench.loads.leases.num_slots == 0


def test_pages_and_store_share_a_prefix() -> None:
    bench = LoadBench()
    bench.add("first", PROMPT[:9], max_tokens=1)
    bench.step()  # two blocks are in pages now
    live = bench.arrive()
    assert bench.find(1) == chain_keys(ROOT, PROMPT, BLOCK_SIZE)[2:]
    bench.grant(1, tier="disk")
    assert len(live.held_pages) == 2, "what it builds on must stay while it loads"
    bench.finish_copies()
    bench.plan()
    assert live.cached is not None
    assert live.cached == (8, 0, 4, 0)


def test_a_fast_replica_asks_for_no_few_tokens_behind_its_pages() -> None:
    bench = LoadBench()
    bench.add("first", PROMPT[:9], max_tokens=1)
    bench.step()  # two blocks are in pages now
    bench.rates.tokens_per_s = 8 / bench.config.unasked_compute_s
    assert bench.arrive().load_gate is LoadGate.OPEN
    assert bench.port.asked == []
    bench.rates.tokens_per_s /= 2
    assert bench.arrive("slow").load_gate is LoadGate.WAIT


def test_an_idle_replica_asks_for_nothing_that_it_computes_sooner() -> None:
    bench = LoadBench()
    num_blocks = len(chain_keys(ROOT, PROMPT, BLOCK_SIZE))
    bench.rates.tokens_per_s = num_blocks * BLOCK_SIZE / bench.config.unasked_idle_s
    assert bench.arrive(is_alone=True).load_gate is LoadGate.OPEN
    assert bench.port.asked == []
    assert bench.arrive("second").load_gate is LoadGate.WAIT
    bench.rates.tokens_per_s *= 0.99
    assert bench.arrive("longer", is_alone=True).load_gate is LoadGate.WAIT


def test_a_fast_replica_asks_for_a_step_of_tokens_and_for_what_begins_a_prompt() -> None:
    bench = LoadBench(num_pages=80)
    bench.rates.tokens_per_s = 1e9
    assert bench.arrive().load_gate is LoadGate.WAIT
    assert bench.find(0) == chain_keys(ROOT, PROMPT, BLOCK_SIZE)
    bench.step()
    bench.step()
    assert bench.arrive("long", [*PROMPT[:16], *range(65)]).load_gate is LoadGate.WAIT
    assert bench.arrive("short", [*PROMPT[:16], *range(64)]).load_gate is LoadGate.OPEN


def test_a_fast_replica_claims_no_few_tokens_behind_what_was_found() -> None:
    bench = LoadBench()
    bench.rates.tokens_per_s = 1e9
    live = bench.arrive()
    bench.find(2)
    assert bench.claimed == []
    bench.grant(2)
    bench.finish_copies()
    assert live.load_gate is LoadGate.OPEN
    bench.settled()


def test_what_the_pages_hold_is_not_looked_up() -> None:
    bench = LoadBench()
    bench.add("first", PROMPT, max_tokens=1)
    bench.step()
    bench.step()
    assert bench.arrive().load_gate is LoadGate.OPEN
    assert bench.port.asked == []


@pytest.mark.parametrize("reply", [None, Found(0, [])])
def test_nothing_found_is_a_miss(reply: Found | None) -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.answer(Lookup, reply)
    assert live.load_gate is LoadGate.OPEN
    assert bench.plan() == {"a": 16}


@pytest.mark.parametrize("count", [None, 0])
def test_nothing_acquired_is_a_miss(count: int | None) -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.find(4)
    if count is None:
        bench.answer(Acquire, None)
    else:
        bench.grant(0)
    assert live.load_gate is LoadGate.OPEN
    assert bench.blocks.num_used == 0
    bench.settled()


def test_a_failed_copy_cuts_the_prefix() -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.find(4)
    bench.grant(4)
    bench.finish_copies(2)
    assert live.load_gate is LoadGate.OPEN
    assert len(live.held_pages) == 2
    assert bench.blocks.match(live.keys) == 2
    assert bench.blocks.num_used == 2
    assert bench.loads.jobs.num_failed == 1
    bench.plan()
    assert live.cached == (0, 8, 0, 0)
    bench.settled()


def test_a_store_that_does_not_answer_is_a_miss_after_the_deadline() -> None:
    bench = LoadBench()
    live = bench.arrive()
    assert bench.loads.next_deadline_s == 12.0
    bench.now_s = 11.9
    bench.advance()
    assert live.load_gate is LoadGate.WAIT
    bench.now_s = 12.0
    bench.advance()
    assert live.load_gate is LoadGate.OPEN
    assert live.store_wait_s == 2.0
    assert bench.loads.next_deadline_s == float("inf")
    bench.find(4)  # late
    assert live.load_gate is LoadGate.OPEN
    assert bench.port.asked == []


def test_a_late_grant_is_given_back_unused() -> None:
    bench = LoadBench()
    bench.arrive()
    bench.find(4)
    bench.now_s += 3
    bench.advance()
    bench.grant(4)
    assert bench.copies == []
    assert bench.port.take(Release)[1] == Release([5])
    bench.settled()


def test_a_load_that_takes_too_long_goes_on_without_its_request() -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.find(4)
    bench.grant(4)
    bench.now_s += 3
    bench.advance()
    assert bench.plan() == {"a": 16}, "it computes"
    bench.finish_copies()
    assert bench.blocks.match(live.keys) == 4, "the blocks are there for the next one"
    bench.settled()


def test_pages_of_an_aborted_request_return_only_after_their_copies() -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.find(4)
    bench.grant(4)
    bench.loads.ended(live)
    bench.scheduler.remove(live)
    assert bench.blocks.num_used == 4
    assert bench.port.asked == [], "the slots are still being read"
    bench.finish_copies()
    assert bench.blocks.num_used == 0
    assert bench.port.take(Release)[1] == Release([5])
    bench.settled()


def test_what_the_lookup_has_acquired_is_copied_while_the_next_is_acquired() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    question = bench.port.asked[0][1]
    assert question[:3] == (chain_keys(ROOT, PROMPT, BLOCK_SIZE), 1, bench.config.lease_ttl_s)
    bench.find(4, num_pinned=1)
    assert [copy.checksums for copy in bench.copies] == [b"sum0"]
    assert bench.loads.leases.num_slots == 1
    bench.finish_copies()
    assert live.load_gate is LoadGate.WAIT
    assert bench.blocks.match(live.keys) == 1, "whoever needs the first block finds it"
    assert len(live.held_pages) == 1
    assert bench.released() == [4]
    assert bench.grant(2) == Acquire(live.keys[1:3], bench.config.lease_ttl_s), "twice as many"
    assert bench.grant(1, lease_id=6) == Acquire(live.keys[3:], bench.config.lease_ttl_s)
    assert bench.loads.check() == []
    bench.finish_copies()
    assert sorted(bench.released()) == [5, 6]
    assert live.load_gate is LoadGate.OPEN
    assert len(live.held_pages) == 4
    bench.plan()
    assert live.cached == (0, 16, 0, 0)
    assert live.bytes_loaded == 400
    bench.settled()


def test_those_behind_acquire_less_with_their_lookups() -> None:
    """Together no more than may be under way."""
    bench = LoadBench(num_pages=200, first_load_blocks=6)
    for number in range(9):
        bench.arrive(f"r{number}", list(range(100 * number, 100 * number + len(PROMPT))))
    wanted = [question.max_pinned for _, question in bench.port.asked]
    assert wanted[:4] == [6, 3, 2, 1]
    assert wanted[bench.config.max_loading_requests :] == [0]
    bench.loads.lost(bench.now_s)
    usual = EngineConfig()
    assert sum(usual.first_load_blocks // (place + 1) for place in range(usual.max_loading_requests)) <= usual.max_loading_blocks


def test_blocks_are_held_as_they_come_in_whatever_order() -> None:
    bench = LoadBench(first_load_blocks=2)
    live = bench.arrive()
    bench.find(4, num_pinned=2)
    bench.grant(2)
    first, *others = bench.copies
    bench.copies = others
    bench.finish_copies()
    assert bench.blocks.match(live.keys) == len(live.held_pages) == 0
    assert bench.released() == [5]
    assert bench.loads.check() == []
    bench.copies = [first]
    bench.finish_copies()
    assert len(live.held_pages) == 4
    assert live.load_gate is LoadGate.OPEN
    bench.settled()


def test_nothing_is_acquired_behind_a_copy_that_failed() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    bench.find(4, num_pinned=1)
    bench.finish_copies(0)
    assert live.load_gate is LoadGate.WAIT, "the next piece is being acquired"
    bench.grant(2)
    assert bench.copies == []
    assert sorted(bench.released()) == [4, 5]
    assert live.load_gate is LoadGate.OPEN
    bench.plan()
    assert reasons(live) == {"store_unavailable": 16, "partial_block": 2}
    bench.settled()


def test_blocks_behind_a_copy_that_failed_are_not_published() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    bench.find(3, num_pinned=1)
    bench.grant(2)
    bench.finish_copies(0)
    assert live.load_gate is LoadGate.OPEN
    assert bench.blocks.num_cached == bench.blocks.num_used == 0
    assert sorted(bench.released()) == [4, 5]
    bench.settled()


def test_a_piece_that_comes_short_is_the_last() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    bench.find(4, num_pinned=1)
    bench.grant(1)
    assert bench.port.asked == []
    bench.finish_copies()
    assert live.load_gate is LoadGate.OPEN
    assert len(live.held_pages) == 2
    bench.plan()
    assert reasons(live) == {"evicted": 8, "partial_block": 2}
    bench.settled()


def test_a_store_that_cannot_be_asked_for_the_next_piece_has_failed() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    ticket, _ = bench.port.take(Lookup)
    bench.loads.answered(StoreAnswer(ticket, Found(4, [("dram", 4)], pinned=acquired(1, 4))), bench.now_s)
    bench.port.state = StoreState.LOST
    bench.advance()
    assert live.load_gate is LoadGate.WAIT
    bench.finish_copies()
    assert live.load_gate is LoadGate.OPEN
    assert live.store_failed
    assert len(live.held_pages) == 1
    bench.settled()


def test_a_request_that_ends_between_two_pieces() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    bench.find(4, num_pinned=1)
    bench.finish_copies()
    bench.loads.ended(live)
    bench.scheduler.remove(live)
    assert bench.blocks.num_used == 3, "the job keeps what the request did not hold"
    bench.grant(2)
    assert bench.copies == []
    assert sorted(bench.released()) == [4, 5]
    assert bench.blocks.num_used == 0
    assert bench.blocks.num_cached == 1
    bench.settled()


def test_a_lost_store_between_two_pieces() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    bench.find(4, num_pinned=1)
    ticket, _ = bench.port.take(Acquire)
    bench.port.state = StoreState.LOST
    bench.loads.answered(StoreAnswer(ticket, None), bench.now_s)
    bench.loads.lost(bench.now_s)
    assert live.load_gate is LoadGate.OPEN
    assert live.store_failed
    bench.finish_copies()
    assert bench.loads.leases.num_slots == bench.blocks.num_used == 0
    bench.settled()


def test_what_the_lookup_has_acquired_for_nobody_is_given_back() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    bench.loads.ended(live)
    bench.scheduler.remove(live)
    bench.find(4, num_pinned=1)
    assert bench.released() == [4]
    bench.settled()


def test_what_the_lookup_has_acquired_for_a_request_without_room_is_given_back() -> None:
    bench = LoadBench(num_pages=10, first_load_blocks=1)
    bench.add("row", 16, max_tokens=8)
    bench.step()
    live = bench.arrive()
    bench.find(4, num_pinned=1)
    assert live.load_gate is LoadGate.NO_ROOM
    assert bench.released() == [4]
    bench.scheduler.remove(bench.scheduler.running[0])
    bench.advance()
    assert isinstance(bench.port.asked[0][1], Acquire)


def test_two_lookups_that_acquire_the_same_block_copy_it_once() -> None:
    bench = LoadBench(first_load_blocks=1)
    first, second = bench.arrive("a"), bench.arrive("b", [*PROMPT[:16], 1, 2, 3])
    ticket, question = bench.port.asked.pop(1)
    assert isinstance(question, Lookup)
    bench.find(1, num_pinned=1)
    bench.loads.answered(StoreAnswer(ticket, Found(1, [("dram", 1)], pinned=acquired(1, lease_id=9))), bench.now_s)
    bench.advance()
    assert bench.released() == [9]
    assert bench.arrive("c", [*PROMPT[:16], 7]).load_gate is LoadGate.WAIT
    assert bench.port.asked[-1][1].max_pinned == 0, "that block is being read"
    assert len(bench.copies) == 1
    bench.finish_copies()
    assert first.load_gate is second.load_gate is LoadGate.OPEN
    bench.find(0)
    bench.settled()


def test_what_the_lookup_has_acquired_is_given_back_when_others_come_first() -> None:
    bench = LoadBench(max_num_seqs=1)
    live = bench.arrive()
    bench.scheduler.waiting.appendleft(bench.live(make_request("preempted", [1] * 18)))
    bench.find(4, num_pinned=1)
    assert bench.released() == [4]
    assert bench.copies == []
    bench.scheduler.waiting.popleft()
    bench.advance()
    assert bench.grant(4) == Acquire(live.keys, bench.config.lease_ttl_s)
    bench.finish_copies()
    assert live.load_gate is LoadGate.OPEN
    bench.settled()


def test_a_request_far_from_its_turn_is_looked_up_without_acquiring() -> None:
    bench = LoadBench(max_loading_requests=1)
    bench.arrive("a")
    bench.arrive("b", [9] * 18)
    assert [question.max_pinned for _, question in bench.port.asked] == [bench.config.first_load_blocks, 0]


def test_a_block_that_a_row_has_computed_meanwhile_is_not_copied() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    bench.find(4, num_pinned=1)
    bench.now_s += 3
    bench.advance()
    assert bench.plan() == {"a": 16}, "it waits no longer, and computes"
    bench.apply()
    assert bench.blocks.match(live.keys) == 4
    other = bench.arrive("b", [*PROMPT[:16], 1])
    assert other.load_gate is LoadGate.OPEN
    bench.grant(2)
    assert len(bench.copies) == 1, "that of the first block"
    bench.finish_copies()
    assert bench.blocks.num_used == len(live.pages)
    bench.settled()


def test_pages_that_others_needed_more_are_not_held_again() -> None:
    bench = LoadBench(first_load_blocks=1)
    live = bench.arrive()
    bench.find(3, num_pinned=1)
    bench.finish_copies()
    assert bench.scheduler.drop_held_pages()
    bench.grant(2)
    bench.finish_copies()
    assert live.held_pages == []
    assert live.load_gate is LoadGate.OPEN, "they are still there"
    assert bench.blocks.num_cached == 3
    bench.plan()
    assert live.cached == (0, 12, 0, 0)
    bench.settled()


def test_two_requests_load_a_block_once() -> None:
    bench = LoadBench()
    first, second = bench.arrive("a"), bench.arrive("b", [*PROMPT[:16], 1, 2, 3])
    bench.find(4)
    bench.find(4)
    bench.grant(4)
    assert bench.port.asked == [], "b waits for a's load"
    assert second.load_gate is LoadGate.WAIT
    bench.finish_copies()
    assert first.load_gate is second.load_gate is LoadGate.OPEN
    bench.plan()
    assert first.cached == (0, 16, 0, 0)
    assert second.cached == (16, 0, 0, 0)


def test_a_block_that_a_row_is_computing_is_not_loaded() -> None:
    bench = LoadBench(max_num_batched_tokens=8)
    bench.add("row", PROMPT, max_tokens=1)
    bench.plan()
    live = bench.arrive()
    bench.find(4)
    assert bench.port.asked == []
    assert live.load_gate is LoadGate.WAIT
    bench.apply()
    bench.step()
    bench.step()
    bench.advance()
    assert live.load_gate is LoadGate.OPEN


def test_loads_are_bounded() -> None:
    bench = LoadBench(max_loading_blocks=6, max_loading_requests=2, num_pages=200)
    for i in range(4):
        bench.arrive(f"r{i}", [i * 50 + j for j in range(18)])
    for _ in range(4):
        bench.find(4)
    wanted = [question.keys for _, question in bench.port.asked if isinstance(question, Acquire)]
    assert [len(keys) for keys in wanted] == [4, 2], "two requests, six blocks"


def test_a_long_prefix_is_loaded_bit_by_bit() -> None:
    bench = LoadBench(max_loading_blocks=3)
    live = bench.arrive()
    bench.find(4)
    bench.grant(3, lease_id=5)
    bench.finish_copies()
    assert live.load_gate is LoadGate.WAIT
    assert bench.released() == [5]
    bench.grant(1, lease_id=6)
    bench.finish_copies()
    assert live.load_gate is LoadGate.OPEN
    assert len(live.held_pages) == 4
    bench.plan()
    assert live.cached == (0, 16, 0, 0)


def test_nothing_is_acquired_for_a_request_without_room() -> None:
    bench = LoadBench(num_pages=10)
    bench.add("row", 16, max_tokens=8)
    bench.step()
    live = bench.arrive()
    bench.find(4)
    assert live.load_gate is LoadGate.NO_ROOM
    assert bench.port.asked == []
    bench.now_s += 100
    bench.advance()
    assert live.load_gate is LoadGate.NO_ROOM, "it waits for pages, not for the store"
    assert bench.loads.next_deadline_s == float("inf")
    bench.scheduler.remove(bench.scheduler.running[0])
    bench.advance()
    assert live.load_gate is LoadGate.WAIT
    assert isinstance(bench.port.asked[0][1], Acquire)


def test_a_lost_store_ends_every_wait() -> None:
    bench = LoadBench()
    looking, loading = bench.arrive("a", [1] * 18), bench.arrive("b")
    ticket, _ = bench.port.asked.pop(0)
    bench.find(4)
    bench.grant(4)
    sent = bench.copies
    bench.port.state = StoreState.LOST
    bench.loads.answered(StoreAnswer(ticket, None), bench.now_s)
    bench.loads.lost(bench.now_s)
    assert looking.load_gate is loading.load_gate is LoadGate.OPEN
    assert bench.loads.leases.num_slots == 0
    assert bench.blocks.num_used == len(sent) == 4, "the ranks still copy into these"
    bench.finish_copies()
    bench.settled()
    assert bench.blocks.num_used == 0


def test_copies_that_were_not_sent_are_dropped_with_the_store() -> None:
    bench = LoadBench()
    bench.arrive()
    bench.find(4)
    ticket, _ = bench.port.take(Acquire)
    bench.loads.answered(StoreAnswer(ticket, Acquired(5, [Slot(0, 1, b"")], [("dram", 1)])), bench.now_s)
    bench.port.state = StoreState.LOST
    bench.loads.lost(bench.now_s)
    assert bench.loads.jobs.take_copies() == []
    assert bench.blocks.num_used == 0
    bench.settled()


def test_only_those_near_the_head_of_the_queue_are_looked_up() -> None:
    bench = LoadBench(lookup_ahead=2)
    third = [bench.arrive(f"r{i}", [i * 50 + j for j in range(18)]) for i in range(3)][2]
    assert len(bench.port.asked) == 2
    assert third.load_gate is LoadGate.WAIT
    bench.answer(Lookup, None)
    bench.plan()
    bench.advance()
    assert len(bench.port.asked) == 2, "one was answered, its request admitted, and the third came near"


def behind_another_replica(**config: object) -> tuple[LoadBench, LiveRequest]:
    bench = LoadBench(**config)
    bench.claim_outcome = ClaimOutcome.ELSEWHERE
    live = bench.arrive()
    bench.find(0)
    return bench, live


def test_what_the_store_lacks_is_claimed_and_then_computed() -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.find(1)
    bench.grant(1)
    keys = chain_keys(ROOT, PROMPT, BLOCK_SIZE)
    assert bench.claimed == [keys[1:]]
    bench.finish_copies()
    assert live.load_gate is LoadGate.OPEN
    assert bench.loads.claims.num_blocks == 3
    bench.loads.ended(live)
    assert bench.loads.claims.num_blocks == 0


def test_another_replica_is_waited_for_once_blocks_are_read() -> None:
    bench = LoadBench()
    bench.claim_outcome = ClaimOutcome.ELSEWHERE
    live = bench.arrive()
    bench.find(1, num_pinned=1)
    assert bench.loads.phases() == ["loading"]
    bench.finish_copies()
    assert bench.loads.phases() == ["awaiting"]
    assert live.load_gate is LoadGate.WAIT


def test_a_block_that_another_replica_computes_is_waited_for() -> None:
    bench, live = behind_another_replica()
    assert live.load_gate is LoadGate.WAIT
    assert bench.port.asked == []
    assert bench.loads.next_deadline_s == pytest.approx(10.005)
    bench.now_s = bench.loads.next_deadline_s
    bench.advance()
    bench.find(0)
    assert live.load_gate is LoadGate.WAIT
    assert bench.loads.next_deadline_s == pytest.approx(10.015), "it looks less and less often"
    bench.now_s = bench.loads.next_deadline_s
    bench.advance()
    bench.find(4)
    bench.grant(4)
    bench.finish_copies()
    assert live.load_gate is LoadGate.OPEN
    assert live.store_wait_s == pytest.approx(0.015)
    bench.plan()
    assert live.cached == (0, 16, 0, 0)
    bench.settled()


def test_blocks_are_loaded_as_the_other_replica_delivers_them() -> None:
    bench, live = behind_another_replica()
    bench.now_s = bench.loads.next_deadline_s
    bench.advance()
    bench.find(2)
    bench.grant(2)
    bench.finish_copies()
    assert live.load_gate is LoadGate.WAIT, "the other two are still to come"
    assert bench.port.take(Release)[1] == Release([5])
    bench.now_s = bench.loads.next_deadline_s
    bench.advance()
    assert bench.find(2) == live.keys[2:]
    bench.grant(2)
    bench.finish_copies()
    assert live.load_gate is LoadGate.OPEN
    bench.settled()


def test_another_replica_that_gives_up_is_followed_at_the_next_look() -> None:
    bench, live = behind_another_replica()
    bench.claim_outcome = ClaimOutcome.GRANTED
    bench.now_s = bench.loads.next_deadline_s
    bench.advance()
    bench.find(0)
    assert live.load_gate is LoadGate.OPEN
    assert bench.plan() == {"a": 16}


def test_nobody_waits_for_another_replica_for_ever() -> None:
    bench, live = behind_another_replica(single_flight_timeout_s=0.5)
    while live.load_gate is LoadGate.WAIT and bench.now_s < 20:
        bench.now_s = bench.loads.next_deadline_s
        bench.advance()
        if bench.port.asked:
            bench.find(0)
    assert bench.now_s == pytest.approx(10.5)
    assert live.load_gate is LoadGate.OPEN
    assert bench.plan() == {"a": 16}


def test_the_wait_for_another_replica_grows_with_the_tokens_up_to_a_bound() -> None:
    config = LoadBench(single_flight_timeout_s=0.5, single_flight_max_s=3.0).config
    assert [config.single_flight_limit_s(tokens) for tokens in (16, 1000, 4000, 100_000)] == [0.5, 0.5, 2.0, 3.0]


def test_single_flight_can_be_turned_off() -> None:
    bench = LoadBench(single_flight_timeout_s=0.0)
    live = bench.arrive()
    bench.find(0)
    assert bench.claimed == []
    assert live.load_gate is LoadGate.OPEN


def test_many_that_wait_for_one_block_look_once() -> None:
    bench, _ = behind_another_replica()
    for i in range(3):
        bench.arrive(f"r{i}")
        bench.find(0)
    bench.now_s += 0.1
    bench.advance()
    assert len(bench.port.asked) == 1


def test_claims_of_an_aborted_request_are_given_up_but_for_those_that_another_needs() -> None:
    bench = LoadBench()
    first = bench.arrive("a")
    bench.find(0)
    second = bench.arrive("b", [*PROMPT[:8], *range(10)])
    bench.find(0)
    keys = first.keys
    for request in (first, second):
        bench.loads.ended(request)
        bench.scheduler.remove(request)
        bench.advance()
    assert bench.given_up() == [set(keys[2:]), set(second.keys)]
    assert bench.loads.claims.num_blocks == 0


def test_a_claim_that_is_granted_too_late_is_given_up() -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.loads.ended(live)
    bench.scheduler.remove(live)
    bench.find(0)
    assert bench.given_up() == [set(live.keys)]


def test_a_lost_store_forgets_claims() -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.find(0)
    bench.port.state = StoreState.LOST
    bench.loads.lost(bench.now_s)
    assert bench.loads.claims.num_blocks == 0
    bench.loads.ended(live)
    bench.settled()


def reasons(live: LiveRequest) -> dict[str, int]:
    assert live.receipt is not None
    return live.receipt.not_reused


def test_what_is_cheaper_to_compute_is_neither_claimed_nor_waited_for() -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.answer(Lookup, Found(1, [("dram", 1)], 2, MissReason.CHEAPER_TO_COMPUTE))
    assert bench.loads.claims.num_blocks == 0
    bench.grant(1)
    bench.finish_copies()
    bench.plan()
    assert reasons(live) == {"cheaper_to_compute": 8, "cold": 4, "partial_block": 2}


def test_the_store_says_what_it_has_evicted() -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.answer(Lookup, Found(0, [], 0, MissReason.EVICTED))
    bench.plan()
    assert reasons(live) == {"evicted": 16, "partial_block": 2}


@pytest.mark.parametrize(
    ("shortfall", "expected"),
    [(MissReason.LATE, "store_unavailable"), (MissReason.NO_SPACE, "store_unavailable"), (MissReason.LOST, "evicted")],
)
def test_what_was_offered_and_did_not_come(shortfall: MissReason, expected: str) -> None:
    bench = LoadBench()
    live = bench.arrive()
    bench.answer(Lookup, Found(4, [("disk", 4)]))
    bench.answer(Acquire, Acquired(5, [Slot(0, 7, b"sum")], [("disk", 1)], shortfall))
    bench.finish_copies()
    bench.plan()
    assert reasons(live) == {expected: 12, "partial_block": 2}


def ahead(num_found: int = 4) -> tuple[LoadBench, LiveRequest]:
    """A lone request whose step need not wait for the answers to its copies."""
    bench = LoadBench()
    bench.rates.copy_bytes_per_s = 1e9
    live = bench.arrive()
    bench.find(num_found, num_pinned=num_found)
    assert len(bench.copies) == num_found
    assert live.load_gate is LoadGate.OPEN
    assert live.held_pages == [copy.page for copy in bench.copies]
    return bench, live


def test_a_lone_requests_step_goes_ahead_of_its_copies() -> None:
    bench, live = ahead()
    assert bench.plan() == {"a": 2}
    assert bench.launched[0].plan.waits
    assert live.cached is not None
    assert (live.cached.dram, live.bytes_loaded) == (16, 400)
    assert bench.blocks.match(live.keys) == 0, "nobody else may read them yet"
    assert told(bench) == [], "a copy may still fail"
    bench.finish_copies()
    assert bench.blocks.match(live.keys) == 4
    assert bench.plan() == {"a": 1}
    assert not bench.launched[1].plan.waits
    bench.apply(7)
    assert list(live.tokens[18:]) == [7]
    assert told(bench) == [16]
    assert bench.released() == [4]
    bench.blocks.confirm(2)
    ended(bench, live)


def test_it_waits_also_where_others_have_computed_the_same_blocks_meanwhile() -> None:
    """Its own pages are read all the same, and are not there yet."""
    bench, live = ahead()
    pages = bench.blocks.allocate(4)
    for depth, (page, key) in enumerate(zip(pages, live.extend_keys(BLOCK_SIZE), strict=False)):
        assert bench.blocks.publish(page, Published(key, live.keys[depth - 1] if depth else ROOT, depth))
    bench.blocks.unpin(pages)
    assert bench.plan() == {"a": 2}
    assert bench.launched[0].plan.waits
    assert bench.launched[0].plan.rows_in[0].pages[:4] == [copy.page for copy in bench.copies]
    bench.finish_copies()
    bench.apply(7)
    assert list(live.tokens[18:]) == [7]
    ended(bench, live)


def test_where_a_copy_fails_the_row_that_went_ahead_counts_for_nothing() -> None:
    bench, live = ahead()
    bench.plan()
    bench.finish_copies(2)
    assert bench.plan() is None, "nothing more is asked of that row"
    bench.apply(7)
    starts_again(bench, live)


def test_so_it_is_with_what_is_in_flight_of_a_row_that_has_been_preempted() -> None:
    bench, live = ahead()
    bench.plan()
    bench.scheduler._preempt(live)
    bench.finish_copies(2)
    bench.apply(7)
    starts_again(bench, live)


def starts_again(bench: LoadBench, live: LiveRequest) -> None:
    """With the blocks before the third one, whose copy has failed."""
    assert list(live.tokens) == PROMPT
    assert bench.plan() == {"a": 10}
    assert not bench.launched[0].plan.waits
    bench.apply(8)
    assert list(live.tokens[18:]) == [8]
    assert told(bench) == [8], "two blocks of the four that were expected"
    ended(bench, live)


def told(bench: LoadBench) -> list[int]:
    """Reused tokens, of every output that tells them."""
    return [CachedTokens(*output.cached).total for batch in bench.outputs.take().values() for output in batch if output.cached]


def ended(bench: LoadBench, live: LiveRequest) -> None:
    """With nothing left of it."""
    bench.scheduler.remove(live)
    assert bench.blocks.num_used == 0
    bench.settled()


def test_where_a_copy_fails_before_the_row_is_there_its_pages_are_taken_back() -> None:
    bench, live = ahead()
    pages = list(live.held_pages)
    bench.finish_copies(1)
    assert live.held_pages == pages[:1]
    assert bench.plan() == {"a": 14}
    assert not bench.launched[0].plan.waits
    bench.apply(7)
    assert list(live.tokens[18:]) == [7]
    ended(bench, live)


def test_pages_of_a_request_that_ends_stay_until_their_copies_are_answered() -> None:
    bench, live = ahead()
    bench.plan()
    bench.loads.ended(live)
    bench.scheduler.remove(live)
    bench.blocks.confirm(1)
    assert bench.blocks.num_used == 4
    bench.finish_copies()
    assert bench.blocks.num_used == 0
    bench.settled()


def test_nobody_goes_ahead_beside_others_or_at_an_unknown_or_a_slow_rate() -> None:
    for rate, others in ((0.0, 0), (1000.0, 0), (1e9, 1)):
        bench = LoadBench()
        bench.rates.copy_bytes_per_s = rate
        for number in range(others):
            bench.add(f"other {number}", 3)
            bench.plan()
        live = bench.arrive()
        bench.find(4, num_pinned=4)
        assert live.load_gate is LoadGate.WAIT, (rate, others)
        bench.finish_copies()
        assert live.load_gate is LoadGate.OPEN
