"""Engine, ranks and store together against transformers: the same tokens and the same log-softmax cold, from pages and from the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors
from checkpoints import PARITY_PROMPTS, Expected

from cache_store.process import StoreProcess
from runtime.request import CachedTokens
from tests.integration.replicas import GREEDY, SCORED, Answer, Replica, worker_config
from workers.local import RankPool
from workers.models.config import load_model_config
from workers.step import ALL_LOGPROBS

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BLOCK_SIZE, VOCAB_SIZE, NUM_OUTPUTS = 16, 131, 32
PROMPTS = PARITY_PROMPTS
# With two KV heads, llama-tied-bias lets the ranks of TP=4 share heads.
CASES = [*((name, tp) for name in ("llama", "deepseek") for tp in (1, 2, 4)), ("llama-tied-bias", 4)]
NOTHING = CachedTokens(0, 0, 0, 0)


def check(answer: Answer, expected: Expected, cached: CachedTokens, *, first_position: int = 0) -> None:
    """`first_position`: of the first scored logits."""
    assert answer.token_ids == expected.token_ids
    assert answer.finish_reason == "length"
    assert answer.cached == cached
    scores = answer.scores(VOCAB_SIZE)
    assert len(scores) == len(expected.scores) - first_position
    np.testing.assert_allclose(scores, expected.scores[first_position:], atol=1e-4, rtol=0)


def test_the_latent_checkpoint_sets_every_trap(checkpoints: Any) -> None:
    """What would hide an error of routing or rope, were it not so."""
    folder = checkpoints.folder("deepseek")
    config = load_model_config(folder)
    assert config.moe is not None
    assert 1 < config.moe.num_groups_per_token < config.moe.num_groups
    assert config.moe.num_experts_per_token < config.moe.num_experts
    assert 0 < config.moe.first_moe_layer < config.num_layers
    assert 0 < config.rope.mscale_all_dim < config.rope.mscale
    assert config.rope.original_max_position_embeddings < min(map(len, PROMPTS))
    with safetensors.safe_open(folder / "model.safetensors", "np") as weights:
        biases = [weights.get_tensor(key) for key in weights.keys() if key.endswith("e_score_correction_bias")]  # noqa: SIM118
    assert biases
    assert all(np.count_nonzero(bias) == config.moe.num_experts for bias in biases)


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_cold_from_pages_and_from_the_store(
    checkpoints: Any,
    pool: RankPool,
    start_store: Callable[..., StoreProcess],
    name: str,
    tp: int,
) -> None:
    store = start_store()
    worker = worker_config(checkpoints.folder(name), tp)
    outputs_scored = GREEDY._replace(num_logprobs=ALL_LOGPROBS)

    def ask_both(replica: Replica, tier: str | None) -> None:
        """Both prompts at once, the first time with all positions scored, later from `tier` with what is still computed."""
        request_ids = [replica.submit(prompt, NUM_OUTPUTS, outputs_scored if tier else SCORED) for prompt in PROMPTS]
        for request_id, prompt in zip(request_ids, PROMPTS, strict=True):
            reused = {tier: (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE} if tier else {}
            first_position = len(prompt) - 1 if tier else 0
            check(
                replica.answer(request_id),
                checkpoints.expected(name, prompt, NUM_OUTPUTS),
                NOTHING._replace(**reused),
                first_position=first_position,
            )

    with Replica(pool, worker, store.address, max_num_batched_tokens=37) as replica:
        ask_both(replica, None)
        ask_both(replica, "pages")
        replica.await_offers()
    with Replica(pool, worker, store.address, max_num_batched_tokens=37) as replica:
        ask_both(replica, "dram")
        assert replica.engine.loads.jobs.num_failed == 0
        first_scored = 3 * BLOCK_SIZE + 1  # reuse stops before the logits that score it
        answer = replica.ask(PROMPTS[0], 1, SCORED._replace(prompt_logprobs_start=first_scored))
        assert answer.cached == NOTHING._replace(pages=3 * BLOCK_SIZE)
        scores = checkpoints.expected(name, PROMPTS[0], NUM_OUTPUTS).scores[first_scored - 1 : len(PROMPTS[0])]
        np.testing.assert_allclose(answer.scores(VOCAB_SIZE), scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_the_same_chunks_give_the_same_bits_from_any_tier(
    checkpoints: Any, pool: RankPool, start_store: Callable[..., StoreProcess], name: str
) -> None:
    """In steps of four blocks, a prompt of five leaves its last one for a step of its own, as does one whose first four are there."""
    store = start_store()
    prompt = PROMPTS[1]
    scored = GREEDY._replace(num_logprobs=ALL_LOGPROBS)
    answers = []
    for tiers in (("", "pages"), ("dram",)):
        with Replica(pool, worker_config(checkpoints.folder(name), 2), store.address, max_num_batched_tokens=4 * BLOCK_SIZE) as replica:
            for tier in tiers:
                answers.append(replica.ask(prompt, 4, scored))
                assert answers[-1].cached == NOTHING._replace(**({tier: 4 * BLOCK_SIZE} if tier else {}))
            replica.await_offers()
    assert len({b"".join(answer.logprobs) for answer in answers}) == 1
