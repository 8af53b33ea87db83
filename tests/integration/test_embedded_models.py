"""The models that come with the runtime, against transformers: on text they have never seen, cold and from the store, short and long."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from cache_store.process import StoreProcess
from tests.integration import embedded
from tests.integration.replicas import GREEDY, Replica, worker_config
from workers.local import RankPool

pytestmark = pytest.mark.usefixtures("one_torch_thread")

WINDOW = 1024
SCORED = GREEDY._replace(num_prompt_logprobs=0)  # of the chosen tokens
NUM_LONG, NUM_CONTINUED = 6000, 256


def replica_of(pool: RankPool, name: str, tp: int = 1, store_address: str | None = None, dtype: str = "auto") -> Replica:
    """With the blocks and the context that users get."""
    worker = worker_config(embedded.folder(name), tp, block_size=None, kv_memory_bytes=128 << 20, dtype=dtype)
    return Replica(pool, worker, store_address)


def windows(count: int) -> list[list[int]]:
    """The beginnings of `count` modules."""
    return [list(embedded.held_out(module)[:WINDOW]) for module in ("csv", "heapq", "statistics", "textwrap")[:count]]


def test_both_fit_into_18_mb() -> None:
    folders = [embedded.folder(name) for name in embedded.NAMES]
    assert sum((folder / "model.safetensors").stat().st_size for folder in folders) <= 18_000_000
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) <= 18 << 20  # with tokenizers and cards


@pytest.mark.parametrize("name", embedded.NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-3)])
def test_held_out_perplexity(pool: RankPool, name: str, dtype: str, tolerance: float) -> None:
    with replica_of(pool, name, dtype=dtype) as replica:
        assert replica.info.compute_dtype == dtype
        request_ids = [replica.submit(window, 1, SCORED) for window in windows(4)]
        theirs = np.concatenate([embedded.nlls(name, window, dtype) for window in windows(4)])  # meanwhile
        ours = np.concatenate([replica.answer(request_id).prompt_nlls() for request_id in request_ids])
    assert len(ours) == len(theirs) == 4 * (WINDOW - 1)
    perplexity, expected = math.exp(ours.mean()), math.exp(theirs.mean())
    print(f"{name} {dtype}: perplexity {perplexity:.4f}, transformers {expected:.4f}, {perplexity / expected - 1:+.2e}")
    assert abs(perplexity / expected - 1) <= tolerance
    assert perplexity < 60  # a model that knows nothing has 5120


@pytest.mark.parametrize("name", embedded.NAMES)
def test_the_second_half_scored_on_a_first_half_from_the_store(pool: RankPool, start_store: Callable[..., StoreProcess], name: str) -> None:
    store = start_store(memory_bytes=64 << 20, extent_bytes=8 << 20)
    second_half = SCORED._replace(prompt_logprobs_start=WINDOW // 2 + 1)
    nlls = {}
    for tier in ("", "dram"):
        with replica_of(pool, name, 2, store.address) as replica:
            answers = [replica.ask(window, 1, second_half) for window in windows(2)]
            replica.await_offers()
        assert [answer.cached.total for answer in answers] == [WINDOW // 2 if tier else 0] * 2
        assert not tier or [answer.cached.dram for answer in answers] == [WINDOW // 2] * 2
        nlls[tier] = np.concatenate([answer.prompt_nlls() for answer in answers])
    assert len(nlls[""]) == 2 * (WINDOW // 2 - 1)
    print(f"{name}: mean NLL {nlls[''].mean():.6f} cold, difference from the store {nlls['dram'].mean() - nlls[''].mean():+.2e}")
    assert abs(nlls["dram"].mean() - nlls[""].mean()) <= 1e-4
    theirs = np.concatenate([embedded.nlls(name, window, last=WINDOW // 2 - 1) for window in windows(2)])
    assert abs(nlls["dram"].mean() - theirs.mean()) <= 1e-4


@pytest.mark.parametrize("name", embedded.NAMES)
def test_64_greedy_tokens(pool: RankPool, name: str) -> None:
    prompts = [list(embedded.tokenizer().encode("def read_json(path):", add_special_tokens=True)), list(embedded.held_out("csv")[:200])]
    with replica_of(pool, name) as replica:
        request_ids = [replica.submit(prompt, 64) for prompt in prompts]
        for request_id, prompt in zip(request_ids, prompts, strict=True):
            token_ids = replica.answer(request_id).token_ids
            assert len(token_ids) == 64
            embedded.assert_greedy(name, prompt, token_ids)


@pytest.mark.parametrize("name", embedded.NAMES)
def test_6000_tokens_of_context_help(pool: RankPool, name: str) -> None:
    tokens = list(embedded.held_out("statistics")[: NUM_LONG + NUM_CONTINUED])
    continued = SCORED._replace(prompt_logprobs_start=NUM_LONG)
    with replica_of(pool, name) as replica:
        long_id = replica.submit(tokens, 1, continued)
        short_id = replica.submit(tokens[NUM_LONG - 64 :], 1, SCORED._replace(prompt_logprobs_start=64))
        theirs = embedded.nlls(name, tokens, last=NUM_CONTINUED)  # meanwhile
        long, short = (replica.answer(request_id).prompt_nlls() for request_id in (long_id, short_id))
    print(f"{name}: perplexity {math.exp(long.mean()):.3f} behind {NUM_LONG} tokens, {math.exp(short.mean()):.3f} behind 64")
    assert len(long) == len(short) == NUM_CONTINUED
    assert abs(math.exp(long.mean() - theirs.mean()) - 1) <= 1e-4
    assert long.mean() < short.mean() - 0.1
