"""Replaying traces: known hit rates, bounds that hold for every policy, and the default against LRU on several kinds of streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache_store.eviction import DEFAULT_EVICTION, EVICTION
from cache_store.replay import Trace, belady_hit_rate, infinite_hit_rate, read_trace, replay
from tests.bench.eviction_traces import FAMILIES, make_trace


def trace_of(*requests: str) -> Trace:
    """A letter stands for itself and all before it."""
    return Trace([[text[: i + 1].encode().ljust(16, b"\0") for i in range(len(text))] for text in requests])


def test_hits_are_counted_from_the_first_block_on() -> None:
    trace = trace_of("abc", "abd", "abc", "x", "abcd")
    assert infinite_hit_rate(trace) == (2 + 3 + 3) / 14
    assert replay(trace, 100, EVICTION["lru"]()) == (2 + 3 + 3) / 14
    assert replay(trace, 1, EVICTION["lru"]()) == (1 + 1) / 14, "a, and not what is behind it; x has driven it out"


def test_lru_gives_up_the_tail_of_the_oldest_request() -> None:
    trace = trace_of("abc", "xy", "abc", "xy")
    assert replay(trace, 4, EVICTION["lru"]()) == (2 + 1) / 10


def test_belady_keeps_what_comes_back_first() -> None:
    trace = trace_of("a", "b", "c", "a", "b", "c", "a", "b")
    assert replay(trace, 2, EVICTION["lru"]()) == 0
    assert belady_hit_rate(trace, 2) == 3 / 8


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_is_not_worse_than_lru_and_nobody_beats_belady(family: str) -> None:
    trace = make_trace(family, 1500 if family == "phases" else 700, 3)
    bound = infinite_hit_rate(trace)
    for num_blocks in (200, 800):
        lru, default = (replay(trace, num_blocks, EVICTION[name]()) for name in ("lru", DEFAULT_EVICTION))
        assert default >= lru - 0.001
        assert max(lru, default) <= belady_hit_rate(trace, num_blocks) <= bound


@pytest.mark.parametrize("policy", EVICTION)
def test_every_policy_stays_within_the_bounds(policy: str) -> None:
    trace = make_trace("scans", 600, 5)
    rates = [replay(trace, num_blocks, EVICTION[policy]()) for num_blocks in (50, 400, 100_000)]
    assert rates[0] <= belady_hit_rate(trace, 50)
    assert rates[1] <= belady_hit_rate(trace, 400)
    assert rates[2] == infinite_hit_rate(trace)
    assert rates[0] < rates[1]


def test_the_default_learns_what_lru_cannot_see() -> None:
    trace = make_trace("scans", 2500, 3)
    assert replay(trace, 1000, EVICTION[DEFAULT_EVICTION]()) > replay(trace, 1000, EVICTION["lru"]()) + 0.05


def test_a_trace_is_read_by_its_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"timestamp": 0, "hash_ids": ids}) + "\n" for ids in ([0, 1, 2], [0, 3], [0, 1, 2, 4])))
    trace = read_trace(path)
    assert [len(keys) for keys in trace.requests] == [3, 2, 4]
    assert infinite_hit_rate(trace) == 4 / 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "line 1: hash_ids"),
        ('{"hash_ids": [0]}\n{"hash_ids": ["x"]}\n', "line 2: hash_ids"),
        ("no json\n", "line 1"),
        ('{"hash_ids": [0, 1]}\n{"hash_ids": [2, 1]}\n', "line 2: hash_ids: a block is behind two"),
        ("\n", "no request"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path)
