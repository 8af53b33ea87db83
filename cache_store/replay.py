"""A trace of requests played against an eviction policy, and what no policy could beat.

A trace names per request the blocks of its prompt, each standing for itself and all before it. A block is a hit when it and every block
before it are cached. After a request all its blocks are, those that had to be computed parents first, as engines offer them.

    infinite    every block that was ever seen is cached
    Belady      the block whose next use is farthest in the future goes first (L. Belady, IBM Systems Journal 5, 1966), leaf first
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_store.eviction import EvictionPolicy
from cache_store.keys import hash_fields

NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Trace:
    """`requests`: per request the keys of its blocks, first to last."""

    requests: list[list[bytes]]

    @property
    def num_blocks(self) -> int:
        """Of all requests together: what a hit rate is a share of."""
        return sum(len(keys) for keys in self.requests)


def read_trace(path: Path) -> Trace:
    """One JSON object per line with `hash_ids`, a list of numbers: equal numbers name equal blocks behind equal prefixes.

    That is the format of the traces of R. Qin et al.: Mooncake, FAST 2025. ValueError names the line that is not of it; OSError.
    """
    requests: list[list[bytes]] = []
    parents: dict[bytes, bytes | None] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                ids = json.loads(line)["hash_ids"]
                keys = [hash_fields("trace", str(int(each)).encode()) for each in ids]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}: line {number}: hash_ids: not a list of numbers ({type(error).__name__}: {error})") from error
            for key, parent in zip(keys, [None, *keys], strict=False):
                if parents.setdefault(key, parent) != parent:
                    raise ValueError(f"{path}: line {number}: hash_ids: a block is behind two different ones, so ids do not name prefixes")
            requests.append(keys)
    if not any(requests):
        raise ValueError(f"{path}: no request with blocks")
    return Trace(requests)


class _Room:
    """What a tier keeps: which blocks are present, and who stands behind whom."""

    def __init__(self, num_blocks: int, policy: EvictionPolicy) -> None:
        self._num_blocks, self._policy = num_blocks, policy
        self._parents: dict[bytes, bytes | None] = {}
        self._num_children: dict[bytes, int] = {}

    def num_hits(self, keys: Sequence[bytes]) -> int:
        for count, key in enumerate(keys):
            if key not in self._parents:
                return count
        return len(keys)

    def request(self, keys: Sequence[bytes]) -> int:
        """One request: returns its hits, and takes its other blocks in as far as there is room."""
        num_hits = self.num_hits(keys)
        self._policy.accessed(reversed(keys[:num_hits]))
        parent = keys[num_hits - 1] if num_hits else None
        for key in keys[num_hits:]:
            if not self._place(key, parent):
                break
            parent = key
        return num_hits

    def _place(self, key: bytes, parent: bytes | None) -> bool:
        if parent is not None:
            self._num_children[parent] += 1
            self._policy.shielded(parent)
        while len(self._parents) >= self._num_blocks:
            victim = self._policy.victim()
            if victim is None:
                self._leave(parent)
                return False
            self._policy.removed(victim, evicted=True)
            del self._num_children[victim]
            self._leave(self._parents.pop(victim))
        self._parents[key] = parent
        self._num_children[key] = 0
        self._policy.admitted(key, parent)
        self._policy.exposed(key)
        return True

    def _leave(self, parent: bytes | None) -> None:
        """A child of it is gone."""
        if parent is not None:
            self._num_children[parent] -= 1
            if not self._num_children[parent]:
                self._policy.exposed(parent)


def replay(trace: Trace, num_blocks: int, policy: EvictionPolicy, on_request: Callable[[], None] = lambda: None) -> float:
    """The share of block hits in a cache of `num_blocks`. `on_request` is called after each request, to show progress."""
    room = _Room(num_blocks, policy)
    num_hits = 0
    for keys in trace.requests:
        num_hits += room.request(keys)
        on_request()
    return num_hits / trace.num_blocks


def infinite_hit_rate(trace: Trace) -> float:
    seen: set[bytes] = set()
    num_hits = 0
    for keys in trace.requests:
        num_hits += sum(key in seen for key in keys)
        seen.update(keys)
    return num_hits / trace.num_blocks


class Belady:
    """The policy that knows the future. Told by `begin` which request comes next."""

    def __init__(self, trace: Trace) -> None:
        self._next_uses = _next_uses(trace.requests)
        self._present: dict[bytes, int] = {}  # key -> request that uses it next
        self._exposed: set[bytes] = set()
        self._heap: list[tuple[int, bytes]] = []  # (-next use, key)
        self._coming: dict[bytes, int] = {}

    def begin(self, number: int) -> None:
        self._coming = self._next_uses[number]
        for key in self._coming.keys() & self._present.keys():
            self._present[key] = number  # needed right now

    def end(self) -> None:
        """The request is served: its blocks wait for their next use."""
        for key in self._coming.keys() & self._present.keys():
            self._present[key] = self._coming[key]
            self._push(key)

    def admitted(self, key: bytes, parent: bytes | None = None) -> None:
        self._present[key] = self._coming[key]

    def accessed(self, keys: Iterable[bytes]) -> None:
        pass

    def exposed(self, key: bytes) -> None:
        self._exposed.add(key)
        self._push(key)

    def shielded(self, key: bytes) -> None:
        self._exposed.discard(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:
        self._exposed.discard(key)
        del self._present[key]

    def victim(self) -> bytes | None:
        while self._heap:
            negative, key = self._heap[0]
            if key in self._exposed and self._present[key] == -negative:
                return key
            heapq.heappop(self._heap)
        return None

    def _push(self, key: bytes) -> None:
        if key in self._exposed:
            heapq.heappush(self._heap, (-self._present[key], key))


def belady_hit_rate(trace: Trace, num_blocks: int, on_request: Callable[[], None] = lambda: None) -> float:
    policy = Belady(trace)
    room = _Room(num_blocks, policy)
    num_hits = 0
    for number, keys in enumerate(trace.requests):
        policy.begin(number)
        num_hits += room.request(keys)
        policy.end()
        on_request()
    return num_hits / trace.num_blocks


def _next_uses(requests: Sequence[Sequence[bytes]]) -> list[dict[bytes, int]]:
    """Per request and key, the number of the next request that names it."""
    later: dict[bytes, int] = {}
    uses: list[dict[bytes, int]] = []
    for number, keys in _numbered_backwards(requests):
        uses.append({key: later.get(key, NEVER) for key in keys})
        later.update(dict.fromkeys(keys, number))
    uses.reverse()
    return uses


def _numbered_backwards(requests: Sequence[Sequence[bytes]]) -> Iterator[tuple[int, Sequence[bytes]]]:
    return zip(range(len(requests) - 1, -1, -1), reversed(requests), strict=True)
