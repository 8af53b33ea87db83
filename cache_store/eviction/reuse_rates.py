"""How likely a block is to be used again, by what it is and how long ago it was used: learned while serving.

Blocks are sorted into classes, and the time since a block's last use, its age, into buckets of half an octave. Time is counted in accesses.
Per class and bucket two sums are kept: uses that came at that age, and time that blocks have spent at that age. Their ratio is the rate of
reuse (the hazard, uses per block and access). From it follows the worth of a block at an age:

    worth(age) = max over horizons t of  E[uses within t] / E[time kept within t]

the most uses that a slot can earn per unit of time by keeping the block until its next use or until t, whichever comes first. That is the
hit density of N. Beckmann, H. Chen, A. Cidon: LHD: improving cache hit rate by maximizing hit density, NSDI 2018, with the horizon chosen
as in J. Gittins' index for optimal stopping (1979). If all classes are alike and reuse becomes rarer with age, the order is that of LRU.
"""

from __future__ import annotations

import math

FIRST_AGE_BITS = 6  # ages below 2^6 share a bucket
NUM_BUCKETS = 48  # up to ages of 2^29 accesses
PRIOR_USES = 2.0  # a class counts as if it had seen so many uses per bucket, at the rate of all classes together
PRIOR_AGE_FACTOR = 10.0  # all classes together: as if those uses had come at a rate of 1 / (10 * age)


def bucket_of(age: int) -> int:
    """`age` >= 0, in accesses."""
    bits = age.bit_length()
    if bits <= FIRST_AGE_BITS:
        return 0
    return min(NUM_BUCKETS - 1, 2 * (bits - FIRST_AGE_BITS) - 1 + (age >> (bits - 2) & 1))


def _first_age(bucket: int) -> int:
    octave, half = divmod(bucket - 1, 2)
    return (2 + half << FIRST_AGE_BITS + octave) // 2 if bucket else 0


WIDTHS = [_first_age(bucket + 1) - _first_age(bucket) for bucket in range(NUM_BUCKETS)]
MIDDLES = [_first_age(bucket) + width / 2 for bucket, width in enumerate(WIDTHS)]


class ReuseRates:
    """Of `num_classes` classes, numbered from 0."""

    def __init__(self, num_classes: int) -> None:
        self._uses = [[0.0] * NUM_BUCKETS for _ in range(num_classes)]
        self._time = [[0.0] * NUM_BUCKETS for _ in range(num_classes)]
        self.worth = [[1.0 / middle for middle in MIDDLES] for _ in range(num_classes)]  # by class and bucket; as last learned
        self._next_class = 0
        self._last_age = self._last_bucket = 0

    def used(self, of_class: int, age: int) -> None:
        if age != self._last_age:  # blocks that were used together before have the same
            self._last_age, self._last_bucket = age, bucket_of(age)
        self._uses[of_class][self._last_bucket] += 1.0

    def spent(self, of_class: int, age: int, time: float) -> None:
        """Blocks of a class have together spent that time at that age."""
        self._time[of_class][bucket_of(age)] += time

    def fade(self) -> None:
        """Halves what was learned, so that the present outweighs the past."""
        for row in (*self._uses, *self._time):
            row[:] = [0.5 * value for value in row]

    def learn_next(self) -> None:
        """Computes `worth` of one class anew, of each in turn. O(buckets^2) at most."""
        number = self._next_class
        self._next_class = (number + 1) % len(self._uses)
        all_uses = [sum(column) for column in zip(*self._uses, strict=True)]
        all_time = [sum(column) for column in zip(*self._time, strict=True)]
        rates = []
        for bucket, middle in enumerate(MIDDLES):
            common = (all_uses[bucket] + PRIOR_USES) / (all_time[bucket] + PRIOR_USES * PRIOR_AGE_FACTOR * middle)
            rates.append((self._uses[number][bucket] + PRIOR_USES) / (self._time[number][bucket] + PRIOR_USES / common))
        self.worth[number] = _densities(rates)


def _densities(rates: list[float]) -> list[float]:
    """The worth at the beginning of each bucket, where a block is used at constant rate within a bucket."""
    ends = [1.0 - math.exp(-rate * width) for rate, width in zip(rates, WIDTHS, strict=True)]  # P(used within the bucket | not before)
    densities = []
    for start in range(NUM_BUCKETS):
        unused, uses, time, best = 1.0, 0.0, 0.0, 0.0
        for rate, end in zip(rates[start:], ends[start:], strict=True):
            uses += unused * end
            time += unused * end / rate
            unused *= 1.0 - end
            best = max(best, uses / time)
            if unused < 1e-3:
                break
        densities.append(best)
    return densities
