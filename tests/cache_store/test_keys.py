"""Keys of whole prompts are the keys of their blocks, one after the other."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence

import pytest

from cache_store.keys import BlockKey, block_key, chain_keys, hash_fields

ROOT = BlockKey(hash_fields("root", b"test"))


@pytest.mark.parametrize("make", [list, lambda tokens: array("I", tokens)])
@pytest.mark.parametrize("block_size", [1, 4, 13, 16])
@pytest.mark.parametrize("num_tokens", [0, 3, 16, 35, 64])
def test_a_chain_is_block_after_block(num_tokens: int, block_size: int, make: Callable[[list[int]], Sequence[int]]) -> None:
    tokens = [random.Random(position).randrange(1 << 32) for position in range(num_tokens)]
    keys, parent = [], ROOT
    for start in range(0, num_tokens - block_size + 1, block_size):
        parent = block_key(parent, tokens[start : start + block_size])
        keys.append(parent)
    assert chain_keys(ROOT, make(tokens), block_size) == keys
