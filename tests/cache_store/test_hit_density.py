"""The default policy's parts: ages and their buckets, what worth follows from which rates, who leads, and that its memory is bounded."""

from __future__ import annotations

import itertools
import random

import pytest

from cache_store.eviction.hit_density import GHOSTS_PER_BLOCK, HitDensity
from cache_store.eviction.reuse_rates import MIDDLES, NUM_BUCKETS, WIDTHS, ReuseRates, bucket_of
from cache_store.eviction.shadows import Entry, Leader
from cache_store.replay import replay
from tests.bench.eviction_traces import make_trace


def test_buckets_cover_all_ages_in_order() -> None:
    first = 0
    for bucket, width in enumerate(WIDTHS):
        assert bucket_of(first) == bucket_of(first + width - 1) == bucket
        assert first < MIDDLES[bucket] < first + width
        first += width
    assert bucket_of(1 << 62) == NUM_BUCKETS - 1


def learned(rates: list[float]) -> list[float]:
    """The worth of a class that was used at these rates, by bucket."""
    reuse = ReuseRates(1)
    for bucket, rate in enumerate(rates):
        age = int(MIDDLES[bucket])
        reuse.spent(0, age, 1000 / rate)
        for _ in range(1000):
            reuse.used(0, age)
    reuse.learn_next()
    return reuse.worth[0]


def test_worth_falls_with_age_where_reuse_becomes_rarer() -> None:
    worth = learned([1 / middle for middle in MIDDLES[:20]])
    assert all(later < earlier for earlier, later in itertools.pairwise(worth[:20]))


def test_a_block_before_its_usual_return_is_worth_keeping() -> None:
    rates = [1e-6] * 10 + [1e-2] + [1e-6] * 10  # used again at one age only, as in a loop
    worth = learned(rates)
    assert worth[9] > 10 * worth[11]
    assert worth[9] > worth[0], "the sooner, the better"


def test_worth_leads_after_enough_runs_and_loses_the_lead_quickly() -> None:
    leader = Leader()
    numbers = iter(range(10**6))

    def run(in_shadow: bool) -> None:
        """A block that only one of the two shadows holds."""
        leader.begin_run(10)
        entry = Entry(next(numbers).to_bytes(16, "little"), 0)
        if not in_shadow:
            leader.see(entry, 10)
            leader.begin_run(10)
        entry.in_shadow = in_shadow
        leader.see(entry, 10)

    for _ in range(5):
        run(in_shadow=True)
    assert not leader.is_worth, "that may be chance"
    for _ in range(30):
        run(in_shadow=True)
    assert leader.is_worth
    num_against = 0
    while leader.is_worth:
        run(in_shadow=False)
        num_against += 1
    assert num_against < 15


@pytest.mark.parametrize("family", ["scans", "phases"])
def test_what_it_remembers_is_bounded(family: str) -> None:
    policy = HitDensity()
    replay(make_trace(family, 1000, 1), 200, policy)
    assert len(policy._present) == 200
    assert len(policy._ghosts) <= GHOSTS_PER_BLOCK * 201 + 200
    assert len(policy._known) == len(policy._present) + len(policy._ghosts)
    assert all(policy._known[entry.place] is entry for entry in policy._known)
    assert policy._shadow._num_blocks == sum(entry.in_shadow for entry in policy._known) <= 200


def test_memory_follows_a_cache_that_shrinks() -> None:
    policy, rng = HitDensity(), random.Random(1)
    keys = [number.to_bytes(16, "little") for number in range(500)]
    for key in keys:
        policy.admitted(key)
        policy.exposed(key)
    rng.shuffle(keys)
    for key in keys:
        policy.removed(key, evicted=False)
    assert len(policy._known) == len(policy._ghosts) < 500
