"""More requests than pages: rows are preempted and come back, and nobody can tell from the tokens."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import random_tokens

from tests.integration.replicas import Replica, worker_config
from workers.kv.layout import page_layout
from workers.local import RankPool
from workers.models.config import load_model_config
from workers.step import SamplingSettings

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUM_OUTPUTS = 64
PROMPTS = [random_tokens(length, seed=length) for length in (70, 75, 80, 85, 64, 66, 50, 90)]
# Every other one draws its tokens: a request that comes back goes on where its random stream stood.
SAMPLINGS = [SamplingSettings(temperature=temperature, seed=7, presence_penalty=0.1) for temperature in (0.0, 1.0) * 4]


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_40_pages_give_the_tokens_of_4000(checkpoints: Any, pool: RankPool, name: str) -> None:
    folder = checkpoints.folder(name)
    page_bytes = page_layout(load_model_config(folder), block_size=16, dtype="float32", tensor_parallel_size=1, rank=0).page_bytes
    tokens, num_preemptions = {}, {}
    for num_pages in (40, 4000):
        worker = worker_config(folder, kv_memory_bytes=num_pages * page_bytes)
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
