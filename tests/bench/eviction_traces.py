"""Made-up request streams of several kinds, to see that an eviction policy is good for more than one of them.

Each family is a function of a random generator and a number of requests; a request is a list of block names, each standing for itself and
all before it. No family is drawn from a recording.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence

from cache_store.keys import hash_fields
from cache_store.replay import Trace

Requests = list[list[Hashable]]


def _popular(rng: random.Random, num_requests: int) -> Requests:
    """Documents of Zipf popularity, independent of the past."""
    documents: Requests = [[(number, i) for i in range(rng.randint(2, 12))] for number in range(2000)]
    return rng.choices(documents, [(1 + number) ** -0.9 for number in range(2000)], k=num_requests)


def _scans(rng: random.Random, num_requests: int) -> Requests:
    """Most requests are long and never come back, the others are for a few hundred documents."""
    requests: Requests = []
    for number in range(num_requests):
        if rng.random() < 0.4:
            document = min(int(rng.expovariate(1 / 60)), 400)
            requests.append([("hot", document, i) for i in range(8)])
        else:
            requests.append([("scan", number, i) for i in range(rng.randint(5, 20))])
    return requests


def _chats(rng: random.Random, num_requests: int) -> Requests:
    """Conversations that come back soon with a longer prefix, or end."""
    requests: Requests = []
    open_chats: Requests = []
    for number in range(num_requests):
        if not open_chats or rng.random() < 0.25:
            chat: list[Hashable] = ["system", *(("first", number, i) for i in range(rng.randint(1, 6)))]
        else:
            chat = open_chats.pop(max(0, len(open_chats) - 1 - int(rng.expovariate(1 / 15))))
            chat = chat + [("turn", number, i) for i in range(rng.randint(1, 4))]
        requests.append(chat)
        if rng.random() < 0.75:
            open_chats.append(chat)
    return requests


def _phases(rng: random.Random, num_requests: int) -> Requests:
    """Popularity and recency by turns: what was learned in one phase is wrong in the next."""
    requests: Requests = []
    for number in range(num_requests):
        phase = number // 800
        popular, recent = min(int(rng.expovariate(1 / 80)), 500), int(number / 4 - rng.expovariate(1 / 40))
        document = (phase, popular) if phase % 2 == 0 else (1, recent)
        requests.append([(document, i) for i in range(6)])
    return requests


def _loop(rng: random.Random, num_requests: int) -> Requests:
    """A working set in turn, larger than a small cache, and now and then something else."""
    documents = (number % 300 if rng.random() < 0.8 else -number for number in range(num_requests))
    return [[(document, i) for i in range(5)] for document in documents]


def _system_prompts(rng: random.Random, num_requests: int) -> Requests:
    """Long shared prompts, each with a private tail behind it."""
    prompts: Requests = [[("system", number, i) for i in range(rng.randint(4, 40))] for number in range(40)]
    weights = [1 / (1 + number) for number in range(40)]
    return [rng.choices(prompts, weights)[0] + [("tail", number, i) for i in range(rng.randint(1, 10))] for number in range(num_requests)]


def _tree(rng: random.Random, num_requests: int) -> Requests:
    """Paths of random depth in a tree whose first branches are the popular ones."""
    requests: Requests = []
    for number in range(num_requests):
        path: list[Hashable] = [min(int(rng.expovariate(1.2)), 6) for _ in range(rng.randint(1, 14))]
        requests.append(path + [("private", number)] * (rng.random() < 0.5))
    return requests


def _recent(rng: random.Random, num_requests: int) -> Requests:
    """Documents in a window that moves on: only recency tells."""
    documents = (int(number / 3 - rng.expovariate(1 / 25)) for number in range(num_requests))
    return [[(document, i) for i in range(7)] for document in documents]


def _bursts(rng: random.Random, num_requests: int) -> Requests:
    """Each document is used up to 20 times and then never again: frequency misleads."""
    requests: Requests = []
    left: dict[int, int] = {}
    num_documents = 0
    for _ in range(num_requests):
        while len(left) < 40:
            left[num_documents] = rng.choice([1, 2, 10, 20])
            num_documents += 1
        document = rng.choice(list(left))
        left[document] -= 1
        if not left[document]:
            del left[document]
        requests.append([(document, i) for i in range(6)])
    return requests


FAMILIES: dict[str, Callable[[random.Random, int], Requests]] = {
    "popular documents": _popular,
    "scans": _scans,
    "chats": _chats,
    "phases": _phases,
    "loop": _loop,
    "system prompts": _system_prompts,
    "tree": _tree,
    "recent documents": _recent,
    "bursts": _bursts,
}


def make_trace(family: str, num_requests: int, seed: int) -> Trace:
    return Trace(_keyed(FAMILIES[family](random.Random(f"{family} {seed}"), num_requests)))


def _keyed(requests: Sequence[Sequence[Hashable]]) -> list[list[bytes]]:
    """Keys for names: equal where all names up to there are."""
    numbers: dict[tuple[bytes, Hashable], bytes] = {}
    keyed = []
    for names in requests:
        keys = []
        parent = b""  # of the first
        for name in names:
            parent = numbers.setdefault((parent, name), hash_fields("trace", str(len(numbers)).encode()))
            keys.append(parent)
        keyed.append(keys)
    return keyed
