"""Where to stop bringing blocks: checked against every place where one could stop."""

from __future__ import annotations

import random

import pytest

from cache_store.pricing import LARGE_BYTES, PRIORS, Figure, Ledger
from tests.cache_store.conftest import FakeClock

MB = 1 << 20


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def ledger(clock: FakeClock) -> Ledger:
    return Ledger(clock)


def test_without_a_rate_of_prefill_everything_is_brought(ledger: Ledger) -> None:
    assert ledger.choose([("dram", 3), ("peer", 4)], MB, 16, 0.0).num_blocks == 7
    assert ledger.choose([], MB, 16, 0.0).num_blocks == 0


def test_a_slow_replica_brings_and_a_fast_one_computes(ledger: Ledger) -> None:
    runs = [("dram", 2), ("peer", 100)]  # 100 MiB at 1 GB/s: 0.107 s
    slow = ledger.choose(runs, MB, 16, 1_000.0)
    fast = ledger.choose(runs, MB, 16, 100_000.0)
    assert (slow.num_blocks, fast.num_blocks) == (102, 2)
    assert slow.saved_s == pytest.approx(102 * 0.016 - slow.load_s)
    assert slow.compute_s == pytest.approx(102 * 0.016)
    assert ledger.num_brought == {"dram": 4, "peer": 100}
    assert ledger.num_refused == {"dram": 0, "peer": 100}


def test_a_dear_run_is_worth_it_for_a_cheap_one_behind(ledger: Ledger) -> None:
    """One block from a peer costs more than it saves; with the blocks of the arena that follow it does not."""
    assert ledger.choose([("peer", 1)], MB, 16, 10_000.0).num_blocks == 0
    assert ledger.choose([("peer", 1), ("dram", 50)], MB, 16, 10_000.0).num_blocks == 51


@pytest.mark.parametrize("seed", range(5))
def test_no_other_place_to_stop_is_cheaper(ledger: Ledger, clock: FakeClock, seed: int) -> None:
    rng = random.Random(seed)
    for tier in PRIORS:
        ledger.costs[tier].bytes_per_s.note(rng.uniform(1e8, 1e10), clock())
    for _ in range(200):
        runs = [(rng.choice(list(PRIORS)), rng.randrange(1, 40)) for _ in range(rng.randrange(1, 5))]
        tokens_per_s = rng.uniform(500, 200_000)
        choice = ledger.choose(runs, MB, 16, tokens_per_s)

        def cost_s(num_runs: int, runs: list = runs, tokens_per_s: float = tokens_per_s) -> float:
            latencies = {tier: cost.latency_s.at(clock()) for tier, cost in ledger.costs.items()}
            rates = {tier: cost.bytes_per_s.at(clock()) for tier, cost in ledger.costs.items()}
            to_arena = sum(latencies[tier] + count * MB / rates[tier] for tier, count in runs[:num_runs] if tier != "dram")
            to_pages = sum(count for _, count in runs[:num_runs]) * MB / rates["dram"]
            return to_arena + to_pages + sum(count for _, count in runs[num_runs:]) * 16 / tokens_per_s

        best_s = min(cost_s(number) for number in range(len(runs) + 1))
        chosen = next(n for n in range(len(runs) + 1) if sum(count for _, count in runs[:n]) == choice.num_blocks)
        assert cost_s(chosen) == pytest.approx(best_s)


def test_measurements_move_a_rate_and_time_moves_it_back(clock: FakeClock) -> None:
    rate = Figure(1e9)
    for _ in range(30):
        rate.note(1e7, clock())
    assert rate.at(clock()) == pytest.approx(1e7, rel=0.1)
    assert rate.at(clock() + 29.0) == pytest.approx(1e7, rel=0.1)
    assert rate.at(clock() + 600.0) == pytest.approx(1e9, rel=0.01)


def test_regret_is_what_bringing_took_beyond_computing(ledger: Ledger) -> None:
    ledger.brought("peer", 100 * MB, 0.5, 0.2)
    ledger.brought("peer", 100 * MB, 0.1, 0.2)
    ledger.brought("disk", 100 * MB, 9.0, 0.0)
    assert ledger.regret_s["peer"] == pytest.approx(0.3)
    assert ledger.regret_s["disk"] == 0.0
    assert ledger.costs["peer"].bytes_per_s.at(ledger.clock()) < 1e9
    assert ledger.brought_bytes == {"peer": 200 * MB, "disk": 100 * MB}


def test_a_block_that_came_alone_does_not_make_a_thousand_look_slow(ledger: Ledger, clock: FakeClock) -> None:
    for _ in range(20):
        ledger.brought("peer", 4096, 0.004, 0.0)
        ledger.brought("peer", 100 * LARGE_BYTES, 0.004 + 0.05, 0.0)
    cost = ledger.costs["peer"]
    assert cost.latency_s.at(clock()) == pytest.approx(0.004, rel=0.05)
    assert cost.bytes_per_s.at(clock()) == pytest.approx(100 * LARGE_BYTES / 0.05, rel=0.05)
