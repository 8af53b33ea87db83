"""Receipts: every prompt token of every request is counted once, with its source or the reason why it was computed."""

from __future__ import annotations

from engine_parts import BLOCK_SIZE, Bench, make_request

from cache_store.key_chains import KeyChains
from cache_store.keys import BlockKey, hash_fields
from runtime.engine.live import LiveRequest
from runtime.engine.receipts import MAX_FIRST_BLOCKS, FirstBlocks
from workers.step import SamplingSettings

PROMPT = list(range(18))  # four full blocks and two tokens
ELSEWHERE = BlockKey(hash_fields("another root"))


def admit(bench: Bench, live: LiveRequest) -> dict[str, int]:
    """Runs a request to its end. Returns its reasons, once they are seen to add up."""
    while live in bench.scheduler.waiting or live in bench.scheduler.running:
        bench.step()
    assert live.receipt is not None
    assert live.cached is not None
    assert live.receipt.num_computed_tokens == live.num_prompt - live.cached.total
    assert sum(live.receipt.not_reused.values()) == live.receipt.num_computed_tokens
    return live.receipt.not_reused


def test_cold_then_warm() -> None:
    bench = Bench()
    assert admit(bench, bench.add("a", PROMPT, 1)) == {"cold": 16, "partial_block": 2}
    assert admit(bench, bench.add("b", PROMPT, 1)) == {"partial_block": 2}
    assert admit(bench, bench.add("c", PROMPT[:16], 1)) == {"partial_block": 4}, "the last prompt token is always computed"
    assert admit(bench, bench.add("d", [*PROMPT[:8], 90, 91, 92, 93, 94], 1)) == {"cold": 4, "partial_block": 1}
    assert admit(bench, bench.add("e", [1, 2], 1)) == {"partial_block": 2}


def test_what_was_here_once_is_evicted() -> None:
    bench = Bench(num_pages=8)
    admit(bench, bench.add("a", PROMPT, 1))
    admit(bench, bench.add("b", 26, 1))
    assert bench.blocks.was_evicted(bench.add("c", PROMPT, 1).extend_keys(BLOCK_SIZE)[0])
    assert admit(bench, bench.scheduler.waiting[0]) == {"evicted": 16, "partial_block": 2}
    assert admit(bench, bench.add("d", PROMPT, 1)) == {"partial_block": 2}, "it is back"


def test_evicted_keys_are_remembered_within_a_bound() -> None:
    bench = Bench(num_pages=8)
    for i in range(40):
        admit(bench, bench.add(f"r{i}", 20, 1))
    assert 0 < len(bench.blocks._evicted) <= 4 * 8


def test_the_same_prompt_under_another_root() -> None:
    bench = Bench()
    admit(bench, bench.add("a", PROMPT, 1))
    other = LiveRequest(make_request("b", PROMPT, 1), 1, 0.0, 200, ELSEWHERE, KeyChains())
    bench.scheduler.add(other)
    assert admit(bench, other) == {"other_namespace": 16, "partial_block": 2}
    again = LiveRequest(make_request("c", [*PROMPT[:4], *range(50, 60)], 1), 2, 0.0, 200, ELSEWHERE, KeyChains())
    bench.scheduler.add(again)
    assert admit(bench, again) == {"cold": 8, "partial_block": 2}, "its first block is known under its own root by now"


def test_first_blocks_are_remembered_within_a_bound() -> None:
    first_blocks = FirstBlocks()
    for number in range(MAX_FIRST_BLOCKS + 10):
        first_blocks.note(number.to_bytes(16, "little"), ELSEWHERE)
    assert not first_blocks.is_only_elsewhere((0).to_bytes(16, "little"), BlockKey(b"mine"))
    assert first_blocks.is_only_elsewhere((MAX_FIRST_BLOCKS).to_bytes(16, "little"), BlockKey(b"mine"))


def test_scored_positions_are_not_reused() -> None:
    bench = Bench()
    admit(bench, bench.add("a", PROMPT, 1))
    sampling = SamplingSettings(num_prompt_logprobs=0, prompt_logprobs_start=9)
    assert admit(bench, bench.add("b", PROMPT, 1, sampling=sampling)) == {"scored": 8, "partial_block": 2}


def test_without_caching_nothing_is_reused() -> None:
    bench = Bench(prefix_caching=False)
    assert admit(bench, bench.add("a", PROMPT, 1)) == {"caching_off": 18}


def test_a_store_that_failed_is_the_reason_for_what_it_might_have_had() -> None:
    bench = Bench()
    admit(bench, bench.add("a", PROMPT[:8], 1))
    live = bench.add("b", PROMPT, 1)
    live.store_failed = True
    assert admit(bench, live) == {"store_unavailable": 8, "partial_block": 2}, "two blocks were in pages"


def test_the_first_output_carries_the_receipt() -> None:
    bench = Bench()
    bench.add("a", PROMPT, 2)
    while bench.scheduler.waiting or bench.scheduler.running:
        bench.step()
    first, *others = [output for batch in bench.outputs.take().values() for output in batch]
    assert first.receipt == [18, 0, {"cold": 16, "partial_block": 2}]
    assert all(output.receipt is None for output in others)


def test_a_request_that_was_never_admitted_has_an_empty_receipt() -> None:
    bench = Bench()
    bench.outputs.end(bench.add("a", PROMPT), 1.0, error=("DeadlinePassed", "late"))
    (output,) = bench.outputs.take()[0]
    assert output.receipt == [0, 0, {}]
