"""Reasons for misses, and the estimate of what a store without bounds would hit, against the exact figure."""

from __future__ import annotations

import random

import pytest

from cache_store.accesses import SAMPLE_KEYS, Accesses, MissReason
from tests.cache_store.conftest import FakeClock, key


def test_why_a_block_is_missing() -> None:
    clock = FakeClock()
    accesses = Accesses(clock)
    assert accesses.looked_up("s", [key("a"), key("b")], 0) is MissReason.COLD
    accesses.removed(key("b"))
    assert accesses.looked_up("s", [key("a"), key("b")], 1) is MissReason.EVICTED
    assert accesses.num_misses == {MissReason.COLD: 2}  # the same question again: a poll
    clock.now_s += 10.0
    accesses.looked_up("s", [key("a"), key("b")], 1)
    assert accesses.num_misses == {MissReason.COLD: 2, MissReason.EVICTED: 1}
    assert accesses.looked_up("s", [key("a")], 1) is None


@pytest.mark.parametrize("num_keys", [2_000, 40_000])
def test_the_estimate_is_near_the_truth(num_keys: int) -> None:
    rng = random.Random(7)
    clock = FakeClock()
    accesses = Accesses(clock)
    seen: set[int] = set()
    hits = 0
    num_questions = 2 * num_keys
    for number in range(num_questions):
        name = int(num_keys * rng.random() ** 2)
        hits += name in seen
        seen.add(name)
        accesses.looked_up(f"session {number}", [key(name)], 0)
    assert accesses.infinite_hit_rate == pytest.approx(hits / num_questions, abs=0.02)
    assert len(accesses._sample) <= SAMPLE_KEYS
    assert (accesses.sampled_share < 1.0) == (num_keys > SAMPLE_KEYS)
