"""Two caches that exist as keys only, of the same room as the real one: what each would hold says which rule is the better one now."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable

MAX_COUNT = 3  # uses that are told apart: 1, 2, 3 and more
NUM_CLASSES = 2 * (MAX_COUNT + 1)
TRUST = 3.5  # standard deviations by which its hits must prevail before worth leads
MISTRUST = 1.0  # and by which it must have fallen back from its best lead before it does not lead any more
MAX_RUN = 16  # blocks up to which the hits of one run are taken to come together
FADE_EVERY = 4  # accesses per block of room


class Entry:
    """A block that is present, or was. `Candidates` of the real cache and of a shadow hold it independently."""

    __slots__ = ("children", "count", "had_child", "in_shadow", "is_present", "key", "last", "of_class", "parent", "place")

    def __init__(self, key: bytes, place: int) -> None:
        self.key = key
        self.place = place  # in the list of all known entries
        self.last = 0  # number of its last access
        self.count = 0
        self.had_child = False
        self.of_class = 0
        self.parent: Entry | None = None
        self.is_present = True
        self.in_shadow = False
        self.children = 0  # in the shadow

    def used(self, now: int) -> None:
        self.last = now
        self.count += 1
        if self.count <= MAX_COUNT:  # later uses change no class
            self.classify()

    def classify(self) -> None:
        self.of_class = 2 * min(self.count, MAX_COUNT) + self.had_child


class Candidates:
    """Exposed blocks, by class and last access. Entries that an access has outdated are skipped, as in base.RankHeap."""

    def __init__(self) -> None:
        self._exposed: dict[Entry, None] = {}
        self._heaps: list[list[tuple[int, Entry]]] = [[] for _ in range(NUM_CLASSES)]
        self._num_entries = 0

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._exposed

    def put(self, entry: Entry) -> None:
        """Exposes it, or takes note of its new access."""
        self._exposed[entry] = None
        heapq.heappush(self._heaps[entry.of_class], (entry.last, entry))
        self._num_entries += 1
        if self._num_entries > 3 * len(self._exposed) + 64:
            self._rebuild()

    def discard(self, entry: Entry) -> None:
        self._exposed.pop(entry, None)

    def coldest(self) -> list[Entry]:
        """Of each class that has an exposed block."""
        found = []
        for of_class, heap in enumerate(self._heaps):
            while heap:
                last, entry = heap[0]
                if entry.last == last and entry.of_class == of_class and entry in self._exposed:
                    found.append(entry)
                    break
                heapq.heappop(heap)
                self._num_entries -= 1
        return found

    def _rebuild(self) -> None:
        for heap in self._heaps:
            heap.clear()
        for entry in self._exposed:
            self._heaps[entry.of_class].append((entry.last, entry))
        for heap in self._heaps:
            heapq.heapify(heap)
        self._num_entries = len(self._exposed)


class Shadow:
    """The cache that evicts by worth, leaf first like the real one."""

    def __init__(self, choose: Callable[[list[Entry]], Entry]) -> None:
        """`choose` picks the victim among the coldest of each class."""
        self._choose = choose
        self._candidates = Candidates()
        self._num_blocks = 0

    def touch(self, entry: Entry) -> None:
        """A block that it holds was used."""
        if entry in self._candidates:
            self._candidates.put(entry)

    def insert(self, entry: Entry, room: int) -> None:
        """Takes a block that it lacks, unless it lacks its parent too."""
        parent = entry.parent
        if parent is not None:
            if not parent.in_shadow:
                return
            parent.children += 1  # before room is made: the parent must not go for its child
            self._candidates.discard(parent)
        self.shrink(room - 1)
        entry.in_shadow = True
        entry.children = 0
        self._num_blocks += 1
        self._candidates.put(entry)

    def shrink(self, room: int) -> None:
        while self._num_blocks > room and (coldest := self._candidates.coldest()):
            self._remove(self._choose(coldest))

    def _remove(self, entry: Entry) -> None:
        entry.in_shadow = False
        self._num_blocks -= 1
        self._candidates.discard(entry)
        parent = entry.parent
        if parent is not None:
            parent.children -= 1
            if not parent.children:
                self._candidates.put(parent)


class Leader:
    """Compares the hits of the two rules and says which one to follow.

    Blocks of one request hit or miss together, so the unit of observation is a run of accesses: the hits that worth had in it, less those
    that LRU had. The sum of all runs is the lead of worth; their variance says how far chance alone would carry it. A few very long prompts
    would make that so large that nothing could be decided, hence a long run counts as several of MAX_RUN blocks.
    """

    def __init__(self) -> None:
        self.is_worth = False
        self._lru: OrderedDict[bytes, None] = OrderedDict()  # the shadow that evicts by last use
        self._run = 0
        self._lead = self._variance = 0.0
        self._best_lead = 0.0  # while worth leads
        self._until_fade = 0

    def begin_run(self, room: int) -> None:
        """What follows is independent of what was before."""
        if not self._run:
            return
        if self._until_fade <= 0:
            self._until_fade = FADE_EVERY * room
            self._lead, self._best_lead, self._variance = 0.5 * self._lead, 0.5 * self._best_lead, 0.5 * self._variance
        self._lead += self._run
        self._variance += abs(self._run) * min(abs(self._run), MAX_RUN)
        self._run = 0
        deviation = math.sqrt(self._variance)
        if self.is_worth:
            self._best_lead = max(self._best_lead, self._lead)
            if self._lead <= max(0.0, self._best_lead - MISTRUST * deviation):
                self.is_worth = False
                self._lead = self._variance = 0.0  # its hits of other times do not count any more
        elif self._lead > TRUST * deviation:
            self.is_worth, self._best_lead = True, self._lead

    def see(self, entry: Entry, room: int) -> None:
        """An access, before the other shadow takes the block in."""
        lru, key = self._lru, entry.key
        in_lru = key in lru
        if in_lru:
            lru.move_to_end(key)
        else:
            lru[key] = None
            while len(lru) > room:
                lru.popitem(last=False)
        self._until_fade -= 1
        self._run += entry.in_shadow - in_lru
