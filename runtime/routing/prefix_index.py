"""Which replicas have been sent which blocks: a bounded map from block keys to holders.

A holder names one incarnation of a replica, so what a dead engine held is never asked for again and ages out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from cache_store.keys import BlockKey

_MAX_HOLDERS = 8  # per key; a block held more widely than this needs no finding


class PrefixIndex:
    def __init__(self, max_keys: int = 1 << 18) -> None:
        self._max_keys = max_keys
        self._holders: OrderedDict[BlockKey, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def record(self, holder: str, keys: Sequence[BlockKey]) -> None:
        """Notes that `holder` has, or is about to compute, the blocks of `keys`, which lead a prompt."""
        table = self._holders
        for key in reversed(keys):  # the first block last: of a chain, its end is forgotten first
            known = table.get(key, ())
            if not known or known[-1] != holder:
                table[key] = (*(other for other in known if other != holder), holder)[-_MAX_HOLDERS:]
            table.move_to_end(key)
        while len(table) > self._max_keys:
            table.popitem(last=False)

    def num_leading(self, keys: Sequence[BlockKey], holders: Iterable[str]) -> dict[str, int]:
        """How many leading blocks of `keys` each holder has."""
        counts = dict.fromkeys(holders, 0)
        alive = list(counts)
        for index, key in enumerate(keys, start=1):
            known = self._holders.get(key, ())
            alive = [holder for holder in alive if holder in known]
            if not alive:
                break
            for holder in alive:
                counts[holder] = index
        return counts
