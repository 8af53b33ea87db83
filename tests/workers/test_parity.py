"""The models against transformers, and against themselves in other forms, chunks and batches. Float32 on the CPU."""

import copy

import numpy as np
import pytest
import torch
from checkpoints import CONFIGS, random_tokens
from model_driver import GREEDY, Driver, make_runner

from workers.layers.mla import MlaAttention
from workers.step import ALL_LOGPROBS, SamplingSettings

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SCORED = SamplingSettings(temperature=0.0, num_logprobs=ALL_LOGPROBS, num_prompt_logprobs=ALL_LOGPROBS)
PROMPT = random_tokens(90, seed=1)


def driver(checkpoints, name, **settings):
    return Driver(make_runner(checkpoints.folder(name), **settings))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [None, 7, 37])
def test_log_softmax_at_every_prompt_position(checkpoints, name, chunk):
    run = driver(checkpoints, name)
    run.add(1, PROMPT, SCORED)
    run.prefill([1], chunk)
    np.testing.assert_allclose(run.scores(1), checkpoints.log_softmax(name, PROMPT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_log_softmax_decoding_step_by_step(checkpoints, name):
    """A prompt of one token, then 50 steps of one token over several blocks."""
    run = driver(checkpoints, name)
    run.add(1, PROMPT[:1], SCORED)
    run.prefill([1])
    run.decode([1], 50)
    np.testing.assert_allclose(run.scores(1), checkpoints.log_softmax(name, run.known[1][:-1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens(checkpoints, name):
    run = driver(checkpoints, name)
    run.add(1, PROMPT, GREEDY)
    run.prefill([1], 40)
    run.decode([1], 31)
    assert run.known[1][len(PROMPT) :] == checkpoints.greedy(name, PROMPT, 32, min_gap=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_no_more_than_the_oracle_does(checkpoints, name, dtype):
    """The median distance from the oracle in float32 is about that of the oracle in half precision. (A router that chooses another expert
    moves single positions far, in either of them.)"""
    run = driver(checkpoints, name, dtype=dtype)
    run.add(1, PROMPT, SCORED)
    run.prefill([1], 37)
    run.decode([1], 3)
    tokens = run.known[1][:-1]
    exact = checkpoints.log_softmax(name, tokens)
    half = copy.deepcopy(checkpoints.oracle(name)).to(getattr(torch, dtype))
    with torch.no_grad():
        theirs = np.asarray(half(torch.tensor([tokens])).logits[0].float().log_softmax(-1))
    assert np.median(np.abs(run.scores(1) - exact)) <= 1.25 * np.median(np.abs(theirs - exact))


@pytest.mark.parametrize("name", ["llama", "deepseek"])
@pytest.mark.parametrize("backend", ["reference", "torch_paged"])
def test_rows_that_come_and_go_in_one_batch(checkpoints, name, backend):
    """Prompts in chunks next to decoding rows of other lengths; rows leave and others take their slots and pages."""
    run = driver(checkpoints, name, attention_backend=backend, max_num_seqs=3)
    prompts = {row: random_tokens(length, seed=row) for row, length in ((1, 70), (2, 5), (3, 33), (4, 48), (5, 1))}
    for row in (1, 2, 3):
        run.add(row, prompts[row], SCORED)
    run.step({3: 33, 1: 17, 2: 5})
    run.step({1: 30, 2: 1, 3: 1})
    run.step({2: 1, 1: 23, 3: 1})
    run.remove(2)
    run.add(4, prompts[4], SCORED)
    run.step({1: 1, 3: 1, 4: 1})
    run.step({4: 47, 1: 1})
    run.remove(3)
    run.add(5, prompts[5], SCORED)
    run.step({4: 1, 5: 1, 1: 1})
    run.step({1: 1, 5: 1, 4: 1})
    for row in prompts:
        np.testing.assert_allclose(run.scores(row), checkpoints.log_softmax(name, run.known[row][:-1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_a_row_on_the_pages_of_another(checkpoints, name):
    """A prefix is taken from pages that an earlier row wrote; the same chunk boundaries give the same bits as computing it."""
    run = driver(checkpoints, name)
    run.add(1, PROMPT, SCORED)
    run.step({1: 64})
    run.step({1: 26})
    run.add(2, PROMPT, SamplingSettings(temperature=0.0, num_logprobs=ALL_LOGPROBS), cached=(run.pages[1][:4], 64))
    run.prefill([2])
    assert run.logprobs[2] == run.logprobs[1]


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_the_same_steps_give_the_same_bits(checkpoints, name):
    scores = []
    for _ in range(2):
        run = driver(checkpoints, name)
        run.add(1, PROMPT, SCORED)
        run.add(2, PROMPT[:20], SCORED)
        run.prefill([1, 2], 33)
        run.decode([1, 2], 3)
        scores.append(run.scores(1).tobytes() + run.scores(2).tobytes())
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["deepseek", "deepseek-plain-q"])
def test_both_forms_of_latent_attention_agree(checkpoints, name):
    """Over the same cached latents, for a decode step and a suffix, and with a workspace that forces the merge of many chunks."""
    scores = []
    for absorb in (True, False):
        run = driver(checkpoints, name)
        run.add(1, PROMPT, SCORED)
        run.step({1: 40})
        run.runner._backend._max_bytes = 1 << 14
        for module in run.runner._model.modules():
            if isinstance(module, MlaAttention):
                module.absorb = absorb
        run.step({1: 50})
        run.decode([1], 2)
        scores.append(run.scores(1))
    assert len(scores[0]) == 92
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5, rtol=0)


def test_what_a_page_held_before_does_not_matter(checkpoints):
    """Garbage of an earlier tenant, even NaN, stays out of a row that has only begun the page."""
    run = driver(checkpoints, "llama")
    run.runner.pool.tensor[1:].fill_(float("nan"))
    run.add(1, PROMPT, SCORED)
    run.add(2, PROMPT[:3], SCORED)
    run.prefill([1, 2], 23)
    run.decode([1, 2], 20)
    for row in (1, 2):
        np.testing.assert_allclose(run.scores(row), checkpoints.log_softmax("llama", run.known[row][:-1]), atol=1e-4, rtol=0)


def test_an_empty_plan_runs(checkpoints):
    run = driver(checkpoints, "llama")
    assert run.step({}) == []
    run.add(1, PROMPT)
    assert run.step({}) == []
    run.prefill([1])
    assert len(run.known[1]) == len(PROMPT) + 1
