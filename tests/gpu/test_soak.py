"""A thousand requests of all kinds at one engine over one rank on CUDA, with too few pages and a small store: nothing is lost or leaks."""

from __future__ import annotations

import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cache_store.process import StoreProcess
from tests.integration import embedded
from tests.integration.replicas import Answer, Replica, ask_store, worker_config
from workers.kv.layout import page_layout
from workers.local import RankPool
from workers.models.config import load_model_config
from workers.step import SamplingSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("digest_cache"),
]

NUM_REQUESTS, NUM_WARM_UP, MAX_OPEN = 1000, 100, 100
MAX_PROMPT, MAX_OUTPUTS = 600, 48
NUM_PAGES = 320  # of 16 tokens, with the null page: some fifteen requests; a hundred short ones, until they grow
STORE_BYTES = 256 << 20  # of some 600 MiB that are computed
NUM_BEST = 50
DEADLINE_S = 300.0
LOAD_WITHIN_S = 600.0  # there may be kernels to build
MAX_DEVICE_GROWTH, MAX_HOST_GROWTH = 64 << 20, 100 << 20
MAX_GAP = 0.5  # in nats, between two tokens that bfloat16 may take for each other: its logits come in steps of a sixteenth or an eighth


class Ask(NamedTuple):
    prompt: list[int]
    max_tokens: int
    sampling: SamplingSettings
    twin: int | None  # number of the pair that it is half of; None: it is asked once
    abort_after: int | None  # requests sent later when it is aborted; None: never


class Memory(NamedTuple):
    """In bytes."""

    host: int  # of the rank, without what it shares: the arena fills, and is the store's
    device: int  # in use, by whomever

    @classmethod
    def of(cls, pid: int, device: str) -> Memory:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        used = 0
        if device != "cpu":
            free, total = torch.cuda.mem_get_info()
            used = total - free
        return cls((resident - shared) * os.sysconf("SC_PAGE_SIZE"), used)


class Asks:
    """Makes requests, each a function of the seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._text = [token for module in ("statistics", "csv", "textwrap", "heapq") for token in embedded.held_out(module)]
        self._prefixes = [self._excerpt(length) for length in (100, 200, 400)]

    def make(self, num_requests: int) -> tuple[list[Ask], list[Ask]]:
        """Three in five are halves of greedy pairs. The first list is a crowd for an idle engine: short prompts, one half of some pairs
        among them, that are admitted together and then grow together, for which there is no room."""
        num_pairs, num_short = num_requests * 3 // 10, num_requests * 3 // 50
        num_sampled = num_requests // 2 - num_pairs
        shapes = [self._shape(is_short=twin < num_short) for twin in range(num_pairs)]
        halves = [[self._greedy(twin, *shape, number) for twin, shape in enumerate(shapes)] for number in range(2)]
        crowd = halves[0][:num_short] + self._sampled(num_short, is_short=True)
        first = halves[0][num_short:] + self._sampled(num_sampled - num_short)
        second = halves[1] + self._sampled(num_sampled)
        for each in (crowd, first, second):
            self._rng.shuffle(each)
        return crowd, first + second

    def _excerpt(self, length: int) -> list[int]:
        start = self._rng.randrange(len(self._text) - length)
        return self._text[start : start + length]

    def _shape(self, *, is_short: bool) -> tuple[list[int], int]:
        """A prompt and max_tokens."""
        rng = self._rng
        if is_short:
            return self._excerpt(rng.randint(17, 32)), rng.randint(40, MAX_OUTPUTS)  # two pages, and four before the first one ends
        length = rng.randint(1, MAX_PROMPT)
        prefix = rng.choice(self._prefixes) if rng.random() < 1 / 3 else []
        return (prefix + self._excerpt(length))[:length], rng.randint(1, MAX_OUTPUTS)

    def _greedy(self, twin: int, prompt: list[int], max_tokens: int, number: int) -> Ask:
        """One of the two has logprobs, which say how close a choice was."""
        num_logprobs = NUM_BEST if (twin + number) % 2 else None
        return self._ask(prompt, max_tokens, SamplingSettings(temperature=0.0, num_logprobs=num_logprobs), twin)

    def _sampled(self, count: int, *, is_short: bool = False) -> list[Ask]:
        rng, asks = self._rng, []
        for _ in range(count):
            sampling = SamplingSettings(temperature=rng.uniform(0.5, 1.2), top_p=rng.choice((1.0, 0.9)), seed=rng.getrandbits(64))
            asks.append(self._ask(*self._shape(is_short=is_short), sampling))
        return asks

    def _ask(self, prompt: list[int], max_tokens: int, sampling: SamplingSettings, twin: int | None = None) -> Ask:
        return Ask(prompt, max_tokens, sampling, twin, self._rng.randrange(MAX_OPEN) if self._rng.random() < 0.1 else None)


def send(replica: Replica, asks: Sequence[Ask], deadline_s: float) -> list[Answer]:
    """In this order, MAX_OPEN at a time; returns when all have ended."""
    request_ids: list[str] = []
    aborts: defaultdict[int, list[str]] = defaultdict(list)
    for number, ask in enumerate(asks):
        if number >= MAX_OPEN:
            replica.outputs(request_ids[number - MAX_OPEN])
        assert time.monotonic() < deadline_s, f"{number} of {len(asks)} sent: {replica.engine.stats()}"
        request_ids.append(replica.submit(ask.prompt, ask.max_tokens, ask.sampling))
        if ask.abort_after is not None:
            aborts[number + ask.abort_after].append(request_ids[-1])
        for request_id in aborts.pop(number, ()):
            replica.engine.abort((0, request_id))
    for request_id in [each for late in aborts.values() for each in late]:
        replica.engine.abort((0, request_id))
    return [replica.answer(request_id) for request_id in request_ids]


def check_ends(asks: Sequence[Ask], answers: Sequence[Answer]) -> int:
    """Every answer is complete, or what there was when it was aborted. Returns how many were."""
    for ask, answer in zip(asks, answers, strict=True):
        if answer.finish_reason == "abort":
            assert ask.abort_after is not None
            assert len(answer.token_ids) <= ask.max_tokens
        else:
            assert answer.finish_reason == "length"
            assert len(answer.token_ids) == ask.max_tokens
    return sum(answer.finish_reason == "abort" for answer in answers)


def gap_of(scored: Answer, index: int, other: int) -> float:
    """How much less likely `other` was than the best token, at an output of an answer with logprobs; at least, where not among the best."""
    rows = [row for piece in scored.logprobs for row in piece]
    assert len(rows) == len(scored.token_ids)
    best = dict(rows[index][1:])
    return max(best.values()) - best.get(other, min(best.values()))


def check_twins(asks: Sequence[Ask], answers: Sequence[Answer]) -> None:
    """Greedy answers to the same prompt differ, if at all, from a token on that was nearly a tie."""
    pairs: defaultdict[int, list[tuple[Ask, Answer]]] = defaultdict(list)
    for ask, answer in zip(asks, answers, strict=True):
        if ask.twin is not None and answer.finish_reason == "length":
            pairs[ask.twin].append((ask, answer))
    num_pairs = num_equal = num_first_equal = 0
    gaps = []
    for pair in pairs.values():
        if len(pair) < 2:
            continue  # one was aborted
        num_pairs += 1
        plain, scored = (answer for _, answer in sorted(pair, key=lambda each: each[0].sampling.num_logprobs is not None))
        differing = [index for index, (a, b) in enumerate(zip(plain.token_ids, scored.token_ids, strict=True)) if a != b]
        num_first_equal += 0 not in differing
        if differing:
            gaps.append(gap_of(scored, differing[0], plain.token_ids[differing[0]]))
            if gaps[-1] >= MAX_GAP:
                print(f"a pair of {len(pair[0][0].prompt)} prompt tokens parts at output {differing[0]}: gap {gaps[-1]:.2f}")
                print(f"  {plain.cached} {plain.token_ids}\n  {scored.cached} {scored.token_ids}")
        else:
            num_equal += 1
    worst = max(gaps, default=0.0)
    print(
        f"{num_pairs} greedy pairs: {num_equal} equal, {num_first_equal} in the first token; the others part at gaps of up to {worst:.3f}"
    )
    assert num_pairs > len(asks) // 5
    assert worst < MAX_GAP
    assert num_first_equal >= 0.95 * num_pairs


def soak(pool: RankPool, start_store: Callable[..., StoreProcess], device: str, num_requests: int = NUM_REQUESTS) -> None:
    folder = embedded.folder("gqa")
    layout = page_layout(load_model_config(folder), block_size=16, dtype="bfloat16", tensor_parallel_size=1, rank=0)
    memory_bytes = NUM_PAGES * layout.page_bytes
    limits = {"max_num_seqs": 128, "max_num_batched_tokens": 512, "max_model_len": 1024}
    worker = worker_config(folder, device=device, dtype="bfloat16", kv_memory_bytes=memory_bytes, **limits)
    crowd, others = Asks(seed=14).make(num_requests)
    store = start_store(memory_bytes=STORE_BYTES, extent_bytes=STORE_BYTES // 16)
    with Replica(pool, worker, store.address, load_within_s=LOAD_WITHIN_S, max_num_batched_tokens=512) as replica:
        assert replica.info.num_pages == NUM_PAGES
        ((rank, _),) = replica.info.pids
        began_s = time.monotonic()
        answers = send(replica, crowd, began_s + DEADLINE_S)
        answers += send(replica, others[:NUM_WARM_UP], began_s + DEADLINE_S)
        replica.await_offers()
        before = Memory.of(rank, device)  # the largest batches and the longest prompts have been there
        answers += send(replica, others[NUM_WARM_UP:], began_s + DEADLINE_S)
        seconds = time.monotonic() - began_s
        replica.await_offers()
        after = Memory.of(rank, device)
        stats = replica.engine.stats()
        num_failed_loads = replica.engine.loads.jobs.num_failed
    stat, problems = ask_store(store)

    asks = crowd + others
    num_aborted = check_ends(asks, answers)
    tiers: Counter[str] = Counter()
    for answer in answers:
        tiers.update(answer.cached._asdict())
    growth = Memory(after.host - before.host, after.device - before.device)
    print(
        f"{len(answers)} requests in {seconds:.1f} s, {stats.num_steps} steps, {num_aborted} aborted, {stats.num_preemptions} preemptions"
    )
    print(f"prompt tokens by tier: {dict(tiers)}, of {sum(len(ask.prompt) for ask in asks)}")
    print(f"store: {stat.committed_blocks} blocks committed, {stat.evicted_blocks} evicted")
    print(f"since the warm-up: rank {growth.host / 2**20:+.1f} MiB, device {growth.device / 2**20:+.1f} MiB")
    assert (stats.num_running, stats.num_waiting, stats.used_pages, stats.leased_slots, stats.blocks_pending_offer) == (0, 0, 0, 0, 0)
    assert (stat.held_slots, stat.leases, problems) == (0, 0, [])
    assert num_failed_loads == 0
    assert num_aborted > 0
    assert stats.num_preemptions > 0
    assert stat.evicted_blocks > 0
    assert min(tiers["pages"], tiers["dram"]) > 0  # the store has only what pages held before
    check_twins(asks, answers)
    assert growth.host < MAX_HOST_GROWTH
    assert growth.device < MAX_DEVICE_GROWTH


def test_a_thousand_requests(pool: RankPool, start_store: Callable[..., StoreProcess]) -> None:
    soak(pool, start_store, "cuda")
