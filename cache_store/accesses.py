"""What was asked for and not found, and why; and how often a store without bounds would have found it.

The second is estimated from a sample: keys are uniform, so those below a threshold are a fair share of all (SHARDS, Waldspurger et al.,
FAST 2015). When the sample is full the threshold falls, and keys above it leave: memory stays bounded whatever the traffic.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

GHOST_KEYS = 1 << 16  # evicted keys that are remembered
SAMPLE_KEYS = 1 << 14
FULL = 1 << 32
POLLS = 256  # recent questions by which a repeated one is recognised
POLL_WINDOW_S = 5.0  # asked again within this, a question is the same one


class MissReason(enum.StrEnum):
    COLD = "cold"  # not known here: never stored, or forgotten long ago
    EVICTED = "evicted"
    CHEAPER_TO_COMPUTE = "cheaper_to_compute"  # a tier has it, but bringing it takes longer
    LATE = "late"  # not brought within the time given
    NO_SPACE = "no_space"
    LOST = "lost"  # a tier said that it has it, and then did not deliver it intact


class Accesses:
    """Runs on the store's thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.num_hits: Counter[str] = Counter()  # blocks brought or found, by tier
        self.num_misses: Counter[MissReason] = Counter()
        self.num_sampled = self.num_sampled_hits = 0.0
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._sample: set[int] = set()
        self._threshold = FULL
        self._polls: OrderedDict[tuple[str, bytes], float] = OrderedDict()  # when it was asked last

    def looked_up(self, session_id: str, keys: Sequence[bytes], num_found: int) -> MissReason | None:
        """Counts a question; why the first key that was not found is missing. The same question of a session is a poll: it counts once."""
        reason = None
        if num_found < len(keys):
            reason = MissReason.EVICTED if keys[num_found] in self._evicted else MissReason.COLD
        if not keys or self._is_poll((session_id, keys[-1])):
            return reason
        for key in keys[num_found:]:
            self.num_misses[MissReason.EVICTED if key in self._evicted else MissReason.COLD] += 1
        for key in keys:
            number = int.from_bytes(key[:4], "little")
            if number < self._threshold:
                self._note_sampled(number, key)
        return reason

    def removed(self, key: bytes) -> None:
        """A block left the arena."""
        self._evicted[key] = None
        self._evicted.move_to_end(key)
        if len(self._evicted) > GHOST_KEYS:
            self._evicted.popitem(last=False)

    @property
    def infinite_hit_rate(self) -> float:
        """Of the blocks asked for, the part that had been asked for before; 0 before the first."""
        return self.num_sampled_hits / self.num_sampled if self.num_sampled else 0.0

    @property
    def sampled_share(self) -> float:
        return self._threshold / FULL

    def _note_sampled(self, number: int, key: bytes) -> None:
        name = int.from_bytes(key[:12], "little")
        self.num_sampled += 1
        if name in self._sample:
            self.num_sampled_hits += 1
            return
        self._sample.add(name)
        while len(self._sample) > SAMPLE_KEYS:
            self._threshold //= 2
            self.num_sampled /= 2  # what was counted so far was a larger sample
            self.num_sampled_hits /= 2
            self._sample = {each for each in self._sample if each % FULL < self._threshold}

    def _is_poll(self, question: tuple[str, bytes]) -> bool:
        now_s = self._clock()
        known = now_s - self._polls.get(question, -math.inf) < POLL_WINDOW_S
        self._polls[question] = now_s
        self._polls.move_to_end(question)
        if len(self._polls) > POLLS:
            self._polls.popitem(last=False)
        return known
