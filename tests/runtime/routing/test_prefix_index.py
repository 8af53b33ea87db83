from __future__ import annotations

import random
from array import array

from cache_store.keys import BlockKey, chain_keys
from runtime.routing.prefix_index import PrefixIndex

ROOT = BlockKey(b"r" * 16)


def test_equals_a_naive_model_on_random_prompts() -> None:
    draw = random.Random(3)
    index = PrefixIndex()
    holders = ["a", "b", "c"]
    sent: dict[str, set[BlockKey]] = {holder: set() for holder in holders}
    for _ in range(300):
        prompt = array("I", [draw.randrange(2) for _ in range(draw.randrange(40))])
        keys = chain_keys(ROOT, prompt, 4)
        counts = index.num_leading(keys, holders)
        for holder in holders:
            naive = next((place for place, key in enumerate(keys) if key not in sent[holder]), len(keys))
            assert counts[holder] == naive
        holder = draw.choice(holders)
        index.record(holder, keys)
        sent[holder].update(keys)
    assert len(index) == len(set().union(*sent.values()))


def test_is_bounded_and_forgets_the_ends_of_chains_first() -> None:
    index = PrefixIndex(max_keys=10)
    old, new = (chain_keys(ROOT, array("I", [token] * 32), 4) for token in (1, 2))
    index.record("a", old)
    index.record("a", new)
    assert len(index) == 10
    assert index.num_leading(new, ["a"]) == {"a": 8}
    assert index.num_leading(old, ["a"]) == {"a": 2}


def test_another_incarnation_holds_nothing() -> None:
    index = PrefixIndex()
    keys = chain_keys(ROOT, array("I", range(16)), 4)
    index.record("r0/first", keys)
    assert index.num_leading(keys, ["r0/first", "r0/second"]) == {"r0/first": 4, "r0/second": 0}
    for number in range(20):
        index.record(f"r{number}/only", keys)
    assert index.num_leading(keys, ["r19/only", "r0/first"]) == {"r19/only": 4, "r0/first": 0}
