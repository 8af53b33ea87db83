"""Block keys of prompts, remembered: what a prompt shares with an earlier one is not hashed again.

Hashing the 8,192 tokens of a system prompt takes as long as all else that the scheduler does for such a request. Comparing them with those
of the request before takes an eighteenth of that. A chain is found by its leading 1, 4, 16, ... blocks, the most first, and then compared
further.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from cache_store.keys import BlockKey, chain_keys

MAX_BYTES = 32 << 20  # of token ids that are kept to compare with


class _Chain(NamedTuple):
    column: bytes  # token ids as uint32, of full blocks
    keys: list[BlockKey]


class KeyChains:
    """As `chain_keys`. One thread."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._chains: OrderedDict[tuple[BlockKey, int, bytes], _Chain] = OrderedDict()  # by root, block size and leading blocks

    def keys(self, root: BlockKey, token_ids: Sequence[int], block_size: int) -> list[BlockKey]:
        """Keys of the full blocks of `token_ids`, behind `root`. The list is the caller's own."""
        column = array("I", token_ids).tobytes()
        width = 4 * block_size
        num_blocks = len(column) // width
        if not num_blocks:
            return []
        column = column[: num_blocks * width]
        missing = []
        known, num_shared = None, 0
        for exponent in range(num_blocks.bit_length() - 1 & ~1, -1, -2):
            name = (root, block_size, column[: width << exponent])
            known = self._chains.get(name)
            if known is not None:
                num_shared = _num_shared(column, known.column, 1 << exponent, width)
                self._chains.move_to_end(name)
                break
            missing.append(name)
        keys = known.keys[:num_shared] if known is not None else []
        keys += chain_keys(keys[-1] if keys else root, token_ids[num_shared * block_size :], block_size)
        is_longer = known is not None and num_shared == len(known.keys) < num_blocks  # it goes on where the other one ends
        if is_longer or missing:
            chain = _Chain(column, list(keys))
            if is_longer:
                self._chains[name] = chain
            for each in missing:
                self._chains[each] = chain
                self._num_bytes += _size(each)
        while self._num_bytes > self._max_bytes:
            name, _ = self._chains.popitem(last=False)
            self._num_bytes -= _size(name)
        return keys


def _num_shared(column: bytes, other: bytes, at_least: int, width: int) -> int:
    """Leading blocks of `width` bytes that are the same, of which `at_least` are."""
    low, high = at_least, min(len(column), len(other)) // width
    while low < high:
        middle = (low + high + 1) // 2
        if column[low * width : middle * width] == other[low * width : middle * width]:
            low = middle
        else:
            high = middle - 1
    return low


def _size(name: tuple[BlockKey, int, bytes]) -> int:
    """Bytes that an entry keeps alive, about: its name, and a part of its chain."""
    return 4 * len(name[2])
