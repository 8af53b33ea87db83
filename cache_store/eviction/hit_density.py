"""The default policy: the exposed block that is least worth its slot, by rates of reuse learned from the very stream it serves.

    accesses --> rates of reuse by class and age --> worth of a block                                     (reuse_rates)
             --> two shadow caches, keys only: one evicts by worth, one by last use --> which one leads   (shadows)
    victim   <-- the coldest exposed block of each class; of these, while worth leads, the one of the lowest worth, else the coldest

A block's class is how often it was used (once, twice, more) and whether a block was ever stored behind it. Within a class the coldest is
taken to be worth least, so that a victim is found among as many candidates as there are classes. Keys of evicted blocks are remembered for
a while: their return is what teaches the rates of ages that no block lives to see.

LRU leads at first, and again whenever worth does worse than LRU would have: a shadow LRU tells. So there are no parameters to fit, and
where reuse follows recency alone this is LRU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from cache_store.eviction.reuse_rates import ReuseRates, bucket_of
from cache_store.eviction.shadows import NUM_CLASSES, Candidates, Entry, Leader, Shadow

GHOSTS_PER_BLOCK = 3
SAMPLES_PER_ACCESS = 2  # blocks whose age is sampled, in turn, to learn how much time is spent at which age
MAX_SAMPLES = 256  # of a run; of a longer one each counts for more
LEARN_EVERY = 250  # accesses, and then of one class
FADE_EVERY = 3  # accesses per known key


class HitDensity:
    """An EvictionPolicy."""

    def __init__(self) -> None:
        self._now = 0  # accesses so far
        self._present: dict[bytes, Entry] = {}
        self._ghosts: OrderedDict[bytes, Entry] = OrderedDict()  # the latest eviction last
        self._known: list[Entry] = []  # present ones and ghosts, in no order
        self._hand = 0  # where the sampling of ages stands in `_known`
        self._candidates = Candidates()
        self._rates = ReuseRates(NUM_CLASSES)
        self._leader = Leader()
        self._shadow = Shadow(self._least_worth)
        self._next_learn = self._next_fade = 0

    def admitted(self, key: bytes, parent: bytes | None = None) -> None:
        if parent is None:
            self._leader.begin_run(len(self._present))
        entry = self._ghosts.pop(key, None)
        if entry is None:
            entry = Entry(key, len(self._known))
            self._known.append(entry)
        self._present[key] = entry
        entry.is_present = True
        if not entry.in_shadow:  # else it knows its parent, which the shadow keeps for it
            entry.parent = self._present.get(parent) if parent is not None else None
        if entry.parent is not None and not entry.parent.had_child:
            entry.parent.had_child = True  # neither cache has it exposed now, so its class may change
            entry.parent.classify()
        self._use(entry)
        self._sample_ages(1)
        if entry.in_shadow:
            self._shadow.touch(entry)
        else:
            self._shadow.insert(entry, len(self._present))

    def accessed(self, keys: Iterable[bytes]) -> None:
        self._leader.begin_run(len(self._present))
        missed = []
        num_before = self._now
        for key in keys:
            entry = self._present[key]
            self._use(entry)
            if entry in self._candidates:
                self._candidates.put(entry)
            if entry.in_shadow:
                self._shadow.touch(entry)
            else:
                missed.append(entry)
        for entry in reversed(missed):  # parents first
            self._shadow.insert(entry, len(self._present))
        self._sample_ages(self._now - num_before)

    def exposed(self, key: bytes) -> None:
        entry = self._present[key]
        if entry not in self._candidates:
            self._candidates.put(entry)

    def shielded(self, key: bytes) -> None:
        self._candidates.discard(self._present[key])

    def removed(self, key: bytes, *, evicted: bool) -> None:
        entry = self._present.pop(key)
        entry.is_present = False
        self._candidates.discard(entry)
        self._ghosts[key] = entry
        if not evicted:  # a victim makes room for another block, anything else makes the room smaller
            self._shadow.shrink(len(self._present))
        for _ in range(2):  # one more than comes, so that the number follows a room that shrinks
            if len(self._ghosts) > GHOSTS_PER_BLOCK * (len(self._present) + 1):
                self._forget_oldest()

    def victim(self) -> bytes | None:
        coldest = self._candidates.coldest()
        if not coldest:
            return None
        if self._leader.is_worth:
            return self._least_worth(coldest).key
        return min(coldest, key=_last).key

    def _use(self, entry: Entry) -> None:
        self._leader.see(entry, len(self._present))
        self._now = now = self._now + 1
        if entry.count:
            self._rates.used(entry.of_class, now - entry.last)
        entry.used(now)

    def _sample_ages(self, num_accesses: int) -> None:
        """Of known blocks, after so many accesses: together they have spent that much time, each at its age."""
        known, now = self._known, self._now
        num_samples = min(MAX_SAMPLES, num_accesses * SAMPLES_PER_ACCESS)
        if num_samples:
            time = num_accesses * len(known) / num_samples
        for _ in range(num_samples):
            self._hand = (self._hand + 1) % len(known)
            sample = known[self._hand]
            self._rates.spent(sample.of_class, now - sample.last, time)

    def _least_worth(self, entries: list[Entry]) -> Entry:
        if self._now >= self._next_learn:
            self._next_learn = self._now + LEARN_EVERY
            if self._now >= self._next_fade:
                self._next_fade = self._now + FADE_EVERY * len(self._known)
                self._rates.fade()
            self._rates.learn_next()
        worth, now = self._rates.worth, self._now
        return min(entries, key=lambda entry: (worth[entry.of_class][bucket_of(now - entry.last)], entry.last))

    def _forget_oldest(self) -> None:
        key, entry = self._ghosts.popitem(last=False)
        if entry.in_shadow:  # at most as many as there are present blocks
            self._ghosts[key] = entry
            return
        last = self._known.pop()
        if last is not entry:
            self._known[entry.place] = last
            last.place = entry.place


def _last(entry: Entry) -> int:
    return entry.last
