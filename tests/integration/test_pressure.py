"""More requests than pages: rows are preempted and come back, and nobody can tell from the tokens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_tokens

from cache_store.process import StoreProcess
from tests.integration.replicas import Replica, ask_store, worker_config
from workers.kv.layout import page_layout
from workers.local import RankPool
from workers.models.config import load_model_config
from workers.step import SamplingSettings

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUM_OUTPUTS = 64
PROMPTS = [random_tokens(length, seed=length) for length in (70, 75, 80, 85, 64, 66, 50, 90)]
# Every other one draws its tokens: a request that comes back goes on where its random stream stood.
SAMPLINGS = [SamplingSettings(temperature=temperature, seed=7, presence_penalty=0.1) for temperature in (0.0, 1.0) * 4]


def page_bytes(folder: Path, tp: int) -> int:
    """Of one rank."""
    return page_layout(load_model_config(folder), block_size=16, dtype="float32", tensor_parallel_size=tp, rank=0).page_bytes


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_40_pages_give_the_tokens_of_4000(checkpoints: Any, pool: RankPool, name: str) -> None:
    folder = checkpoints.folder(name)
    tokens, num_preemptions = {}, {}
    for num_pages in (40, 4000):
        worker = worker_config(folder, kv_memory_bytes=num_pages * page_bytes(folder, 1))
        with Replica(pool, worker) as replica:
            assert replica.info.num_pages == num_pages
            request_ids = [replica.submit(prompt, NUM_OUTPUTS, sampling) for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True)]
            tokens[num_pages] = [replica.answer(request_id).token_ids for request_id in request_ids]
            num_preemptions[num_pages] = replica.engine.stats().num_preemptions
            assert replica.engine.stats().used_pages == 0
    assert num_preemptions[40] > 0
    assert num_preemptions[4000] == 0
    assert tokens[40] == tokens[4000]
    assert {len(output) for output in tokens[40]} == {NUM_OUTPUTS}


@pytest.mark.parametrize(("name", "tp"), [("llama", 2), ("deepseek", 1)])
def test_few_pages_and_a_small_store_that_evict_all_the_time(
    checkpoints: Any, pool: RankPool, start_store: Callable[..., StoreProcess], name: str, tp: int
) -> None:
    """Shared prefixes come and go on every tier; every answer is that of an engine with room for all."""
    folder, rng = checkpoints.folder(name), random.Random(11)
    # Of seeds whose tokens are no ties: the best two logits differ by 1e-4 and more, and so do the groups and experts of a choice.
    prefixes = [random_tokens(16 * blocks, seed=200 + blocks) for blocks in (3, 4, 5, 6, 7, 8)]
    prompts = [[*rng.choice(prefixes), *random_tokens(rng.randrange(1, 20), seed=index)] for index in range(36)]
    with Replica(pool, worker_config(folder, tp)) as ample:
        expected = [ample.answer(request_id).token_ids for request_id in [ample.submit(prompt, 12) for prompt in prompts]]
    store = start_store(memory_bytes=1 << 18, extent_bytes=1 << 18)
    worker = worker_config(folder, tp, kv_memory_bytes=41 * page_bytes(folder, tp), max_num_seqs=6)
    tiers: Counter[str] = Counter()
    with Replica(pool, worker, store.address, max_num_batched_tokens=64, offer_retry_s=0.02) as replica:
        for first in range(0, len(prompts), 6):
            burst = range(first, first + 6)
            request_ids = [replica.submit(prompts[index], 12) for index in burst]
            aborted = [replica.submit(prompts[index], 300) for index in burst[:2]]
            for request_id in aborted:
                replica.engine.abort((0, request_id))
            answers = [replica.answer(request_id) for request_id in request_ids]
            assert [answer.token_ids for answer in answers] == expected[first : first + 6]
            assert [replica.answer(request_id).finish_reason for request_id in aborted] == ["abort"] * 2
            for answer in answers:
                tiers.update(answer.cached._asdict())
            replica.await_offers()
        assert replica.engine.stats().used_pages == 0

    stat, problems = ask_store(store)
    print(f"{name}: {dict(tiers)} prompt tokens by tier, {stat.evicted_blocks} blocks evicted from the store")
    assert (stat.held_slots, stat.leases, problems) == (0, 0, [])
    assert stat.evicted_blocks > 0
    assert tiers["pages"] > 0
    assert tiers["dram"] > 0
