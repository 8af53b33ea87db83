"""An engine, a rank on CUDA and a store: prompts cold, from pages, and from the arena that CUDA has registered.

In float32 every tier has to give the tokens of transformers. In bfloat16 the bits depend on the shape of a batch, so warm runs are held
against cold ones, and cold runs in other chunks say how far two right runs are apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoints import PARITY_PROMPTS

from cache_store.process import StoreProcess
from runtime.request import CachedTokens
from tests.integration import embedded
from tests.integration.replicas import GREEDY, SCORED, Answer, Replica, ask_store, watch_plans, worker_config
from workers.config import WorkerConfig
from workers.kv.layout import DEFAULT_BLOCK_SIZE
from workers.local import RankPool
from workers.models.config import load_model_config
from workers.step import ALL_LOGPROBS, SamplingSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("digest_cache"),
]

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
NUM_OUTPUTS = 32
CHUNK, OTHER_CHUNK = 37, 64  # tokens of a step
OUTPUTS_SCORED = GREEDY._replace(num_logprobs=ALL_LOGPROBS)
LOAD_WITHIN_S = 600.0  # there may be kernels to build
STORE_WITHIN_S = 30.0  # a first copy makes streams and registers memory, and a prefix computed meanwhile would be no test of it
WAITING = "dram to a step that waits"
TIERS = ("pages", "dram", WAITING)
Oracle = Callable[[list[int]], np.ndarray]  # log-softmax [tokens, vocabulary] of tokens


class Case(NamedTuple):
    """One prompt and its answers. Scores are log-softmax [outputs, vocabulary] of the cold answer's tokens, whoever computes them."""

    prompt: list[int]
    cold: Answer
    cold_scores: list[np.ndarray]  # by runs in different chunks; the first are the cold answer's own
    warm: dict[str, Answer]  # by tier
    warm_scores: dict[str, np.ndarray]


class Difference(NamedTuple):
    """Between log-softmax of the same tokens."""

    mean: float
    largest: float

    @classmethod
    def between(cls, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Difference:
        """Over all positions of all pairs."""
        distances = [np.abs(actual - expected).ravel() for actual, expected in pairs]
        merged = np.concatenate(distances)
        assert np.isfinite(merged).all()
        return cls(float(merged.mean()), float(merged.max()))

    def __str__(self) -> str:
        return f"mean {self.mean:.2e}, largest {self.largest:.2e}"


def ask_all(replica: Replica, prompts: Sequence[list[int]], sampling: SamplingSettings = OUTPUTS_SCORED) -> list[Answer]:
    """All at once."""
    return [replica.answer(request_id) for request_id in [replica.submit(prompt, NUM_OUTPUTS, sampling) for prompt in prompts]]


def score_all(replica: Replica, prompts: Sequence[list[int]], answers: Sequence[Answer], *, at_once: bool = False) -> list[np.ndarray]:
    """The answers' tokens as the end of the prompt, scored behind what the replica reuses of the prompt before them."""
    request_ids = []
    for prompt, answer in zip(prompts, answers, strict=True):
        request_ids.append(replica.submit([*prompt, *answer.token_ids], 1, SCORED._replace(prompt_logprobs_start=len(prompt))))
        if not at_once:
            replica.answer(request_ids[-1])
    return [replica.answer(request_id).scores(replica.info.vocab_size)[:NUM_OUTPUTS] for request_id in request_ids]


def check_cached(replica: Replica, prompts: Sequence[list[int]], answers: Sequence[Answer], tier: str | None) -> None:
    """Every block that may be reused came from `tier`."""
    size = replica.info.block_size
    for prompt, answer in zip(prompts, answers, strict=True):
        reused = {tier: (len(prompt) - 1) // size * size} if tier else {}
        assert answer.cached == CachedTokens(0, 0, 0, 0)._replace(**reused)
        assert answer.finish_reason == "length"


def run_cases(pool: RankPool, start_store: Callable[..., StoreProcess], worker: WorkerConfig, prompts: Sequence[list[int]]) -> list[Case]:
    """Two replicas, one after the other, share a store. A third has none, and computes everything in chunks of another size."""
    store = start_store()
    limits: dict[str, Any] = {"load_within_s": LOAD_WITHIN_S, "load_timeout_s": STORE_WITHIN_S}
    warm, warm_scores = {}, {}
    with Replica(pool, worker, store.address, max_num_batched_tokens=CHUNK, **limits) as replica:
        cold = ask_all(replica, prompts, SCORED)
        check_cached(replica, prompts, cold, None)
        own_scores = [answer.scores(replica.info.vocab_size)[-NUM_OUTPUTS:] for answer in cold]
        warm["pages"] = ask_all(replica, prompts)
        check_cached(replica, prompts, warm["pages"], "pages")
        warm_scores["pages"] = score_all(replica, prompts, cold)
        replica.await_offers()
        assert replica.engine.offers.num_dropped == 0
    with Replica(pool, worker, store.address, max_num_batched_tokens=CHUNK, **limits) as replica:
        warm["dram"] = ask_all(replica, prompts)
        check_cached(replica, prompts, warm["dram"], "dram")
        warm_scores["dram"] = score_all(replica, prompts, cold)
        assert replica.engine.loads.jobs.num_failed == 0
        replica.await_offers()
    with Replica(pool, worker, store.address, max_num_batched_tokens=CHUNK, **limits) as replica:
        replica.engine._rates.copy_bytes_per_s = 1e12  # one after the other, each with a step that goes ahead of its copies
        plans = watch_plans(replica)
        warm[WAITING] = [replica.ask(prompt, NUM_OUTPUTS, OUTPUTS_SCORED) for prompt in prompts]
        check_cached(replica, prompts, warm[WAITING], "dram")
        warm_scores[WAITING] = score_all(replica, prompts, cold)
        print(f"{sum(plan.waits for plan in plans)} of {len(prompts)} prompts had a step that waited")
        assert any(plan.waits for plan in plans)
        assert replica.engine.loads.jobs.num_failed == 0
    stat, problems = ask_store(store)
    assert (stat.held_slots, stat.leases, problems) == (0, 0, [])
    with Replica(pool, worker, max_num_batched_tokens=OTHER_CHUNK, prefix_caching=False, **limits) as replica:
        other_scores = [score_all(replica, prompts, cold, at_once=at_once) for at_once in (False, True)]
    return [
        Case(
            list(prompt),
            cold[index],
            [own_scores[index], *(scores[index] for scores in other_scores)],
            {tier: warm[tier][index] for tier in TIERS},
            {tier: warm_scores[tier][index] for tier in TIERS},
        )
        for index, prompt in enumerate(prompts)
    ]


def num_equal(left: Sequence[int], right: Sequence[int]) -> int:
    """Leading tokens."""
    return next((index for index, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def top_gaps(scores: np.ndarray) -> np.ndarray:
    """Between the best two, by position."""
    best_two = np.sort(scores, axis=-1)[:, -2:]
    return best_two[:, 1] - best_two[:, 0]


def judge(title: str, cases: list[Case], oracle: Oracle, *, is_routed: bool) -> None:
    """Prints the figures, then holds the warm runs against the cold ones.

    How far two right runs are apart is the larger of what cold runs differ by and what they differ from float32: where experts are chosen
    (`is_routed`), a choice that tips moves one token by more than everything else together, and few tokens would say too little of that.
    For the same reason a token of such a model may differ anywhere behind the first one that is not decided.
    """
    exact = [oracle([*case.prompt, *case.cold.token_ids[:-1]])[-NUM_OUTPUTS:] for case in cases]
    error = Difference.between([(case.cold_scores[0], scores) for case, scores in zip(cases, exact, strict=True)])
    runs = range(len(cases[0].cold_scores))
    drifts = [
        Difference.between([(case.cold_scores[a], case.cold_scores[b]) for case in cases]) for a, b in itertools.combinations(runs, 2)
    ]
    drift = Difference(max(each.mean for each in drifts), max(each.largest for each in drifts))
    print(f"{title}: cold against transformers in float32: {error}")
    print(f"{title}: cold against cold in other chunks: {drift}")
    warm = {tier: Difference.between([(case.warm_scores[tier], case.cold_scores[0]) for case in cases]) for tier in TIERS}
    for tier in TIERS:
        print(f"{title}: from {tier} against cold: {warm[tier]}")
    has_same_bits = all(np.array_equal(case.warm_scores["pages"], case.warm_scores[tier]) for case in cases for tier in TIERS)
    print(f"{title}: from every tier {'the same' if has_same_bits else 'other'} bits")
    limit = Difference(2 * max(drift.mean, error.mean), 2 * max(drift.largest, error.largest))
    wrong = []
    for case, scores in zip(cases, exact, strict=True):
        gaps = top_gaps(case.cold_scores[0])
        first_undecided = next((index for index, gap in enumerate(gaps) if gap < limit.largest), NUM_OUTPUTS)
        num_exact = int((scores.argmax(-1) == case.cold.token_ids).sum())
        label = f"{title}: {len(case.prompt)} tokens"
        print(f"{label}: {num_exact} of {NUM_OUTPUTS} outputs are float32's choice, the first {first_undecided} are decided")
        for tier in TIERS:
            same = num_equal(case.warm[tier].token_ids, case.cold.token_ids)
            gap = f", then a gap of {gaps[same]:.3f}" if same < NUM_OUTPUTS else ""
            print(f"{label}: {case.warm[tier].cached.total} from {tier}, {same} outputs equal to the cold ones{gap}")
            if same < first_undecided or not (is_routed or same == NUM_OUTPUTS or gaps[same] < limit.largest):
                wrong.append(f"{label}: from {tier} another token than cold where the best two are {gaps[same]:.3f} apart")
    wrong += [f"{title}: from {tier} {warm[tier]}, cold runs {limit}" for tier in TIERS if warm[tier].mean > limit.mean]
    assert wrong == []


def check_bfloat16(
    pool: RankPool, start_store: Callable[..., StoreProcess], checkpoints: Any, name: str, device: str, backend: str = "torch_paged"
) -> None:
    worker = worker_config(checkpoints.folder(name), device=device, dtype="bfloat16", attention_backend=backend)
    prompts = [list(prompt) for prompt in PARITY_PROMPTS]
    cases = run_cases(pool, start_store, worker, prompts)
    for case in cases:
        expected = checkpoints.expected(name, tuple(case.prompt), NUM_OUTPUTS)
        same = num_equal(case.cold.token_ids, expected.token_ids)
        print(f"{name} bfloat16: {len(case.prompt)} tokens: {same} outputs equal to those of transformers in float32")
    judge(f"{name} bfloat16", cases, lambda tokens: checkpoints.log_softmax(name, tokens), is_routed=is_routed(checkpoints.folder(name)))


def check_float32(
    pool: RankPool,
    start_store: Callable[..., StoreProcess],
    checkpoints: Any,
    name: str,
    device: str,
    backend: str = "torch_paged",
    *,
    tp: int = 1,
) -> None:
    worker = worker_config(checkpoints.folder(name), tp, device=device, dtype="float32", attention_backend=backend)
    for case in run_cases(pool, start_store, worker, [list(prompt) for prompt in PARITY_PROMPTS]):
        expected = checkpoints.expected(name, tuple(case.prompt), NUM_OUTPUTS)
        outputs = expected.scores[-NUM_OUTPUTS:]
        pairs = {
            "cold": (case.cold.scores(outputs.shape[1]), expected.scores),
            "cold in other chunks": (np.stack(case.cold_scores), np.stack([outputs] * len(case.cold_scores))),
        }
        for tier in TIERS:
            pairs[tier] = (np.stack([case.warm[tier].scores(outputs.shape[1]), case.warm_scores[tier]]), np.stack([outputs] * 2))
        for run, pair in pairs.items():
            print(f"{name} float32: {len(case.prompt)} tokens: {run} against transformers: {Difference.between([pair])}")
        assert [answer.token_ids for answer in (case.cold, *case.warm.values())] == [expected.token_ids] * (1 + len(TIERS))
        for actual, oracle in pairs.values():
            np.testing.assert_allclose(actual, oracle, atol=1e-3, rtol=0)


def check_embedded(pool: RankPool, start_store: Callable[..., StoreProcess], name: str, device: str, backend: str, *, tp: int = 1) -> None:
    """Text that the model has not seen: nearly six blocks of it, exactly five, and one token more than three."""
    folder = embedded.folder(name)
    worker = worker_config(
        folder, tp, device=device, dtype="bfloat16", attention_backend=backend, block_size=None, kv_memory_bytes=64 << 20,
        max_model_len=1024, max_num_batched_tokens=OTHER_CHUNK,
    )  # fmt: skip
    block_size = DEFAULT_BLOCK_SIZE[load_model_config(folder).codec]
    lengths = {"csv": 6 * block_size - 5, "heapq": 5 * block_size, "fractions": 3 * block_size + 1}  # one token left: a step of outputs
    prompts = [list(embedded.held_out(module)[:length]) for module, length in lengths.items()]
    cases = run_cases(pool, start_store, worker, prompts)
    judge(f"{name} {backend} tp {tp}", cases, lambda tokens: embedded.log_softmax(name, tokens), is_routed=is_routed(folder))


def is_routed(folder: Path) -> bool:
    return load_model_config(folder).moe is not None


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_float32_gives_the_tokens_of_transformers_from_every_tier(
    pool: RankPool, start_store: Callable[..., StoreProcess], checkpoints: Any, name: str
) -> None:
    check_float32(pool, start_store, checkpoints, name, "cuda")


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_bfloat16_is_warm_what_it_is_cold(pool: RankPool, start_store: Callable[..., StoreProcess], checkpoints: Any, name: str) -> None:
    check_bfloat16(pool, start_store, checkpoints, name, "cuda")


@pytest.mark.parametrize("name", embedded.NAMES)
def test_the_fast_path_is_warm_what_it_is_cold(pool: RankPool, start_store: Callable[..., StoreProcess], name: str) -> None:
    """By name, since "auto" would take the slower backend where it cannot have this one."""
    check_embedded(pool, start_store, name, "cuda", "flashinfer")


@needs_two
@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_float32_gives_the_tokens_of_transformers_on_two_gpus(
    pool: RankPool, start_store: Callable[..., StoreProcess], checkpoints: Any, name: str
) -> None:
    check_float32(pool, start_store, checkpoints, name, "cuda", tp=2)


@needs_two
@pytest.mark.parametrize("name", embedded.NAMES)
def test_the_fast_path_is_warm_what_it_is_cold_on_two_gpus(pool: RankPool, start_store: Callable[..., StoreProcess], name: str) -> None:
    check_embedded(pool, start_store, name, "cuda", "flashinfer", tp=2)
