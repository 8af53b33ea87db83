"""A runner as the engine sees it: random draws, penalties, logprobs, limits of memory and length."""

import numpy as np
import pytest
import torch
from checkpoints import random_tokens
from model_driver import GREEDY, Driver, make_runner

from workers.config import WorkerConfig
from workers.errors import NotEnoughMemory, UnsupportedConfig
from workers.parallel import Communicator
from workers.runner import Runner, max_batched_tokens
from workers.step import ALL_LOGPROBS, SamplingSettings

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT = random_tokens(20, seed=4)
WARM = SamplingSettings(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, seed=0xDEADBEEF12345678)
PENALISED = SamplingSettings(
    temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.6, num_logprobs=ALL_LOGPROBS
)


def driver(checkpoints, name="llama", **settings):
    return Driver(make_runner(checkpoints.folder(name), **settings))


def outputs(run: Driver, row_id: int, prompt: list[int] = PROMPT) -> list[int]:
    return run.known[row_id][len(prompt) :]


def test_a_seed_draws_the_same_alone_and_in_any_company(checkpoints):
    alone = driver(checkpoints)
    alone.add(1, PROMPT, WARM)
    alone.prefill([1])
    alone.decode([1], 15)
    crowd = driver(checkpoints)
    for row_id in range(2, 8):
        crowd.add(row_id, random_tokens(row_id * 3, row_id), WARM._replace(seed=row_id) if row_id % 2 else GREEDY)
    crowd.prefill(range(2, 8))
    crowd.add(1, PROMPT, WARM)
    crowd.step({3: 1, 1: 8, 2: 1})
    crowd.step({1: 12, 7: 1})
    for _ in range(15):
        crowd.step({5: 1, 1: 1, 4: 1})
    assert outputs(crowd, 1) == outputs(alone, 1)
    other = driver(checkpoints)
    other.add(1, PROMPT, WARM._replace(seed=WARM.seed + (1 << 40)))
    other.prefill([1])
    other.decode([1], 15)
    assert outputs(other, 1) != outputs(alone, 1)


@pytest.mark.parametrize("sampling", [WARM, PENALISED._replace(temperature=0.9, seed=3)])
def test_a_row_that_comes_back_continues_its_draws(checkpoints, sampling):
    """As after a preemption or on another replica: prompt and outputs so far are one sequence, known where the prompt ends."""
    whole = driver(checkpoints)
    whole.add(1, PROMPT, sampling)
    whole.prefill([1])
    whole.decode([1], 12)
    parted = driver(checkpoints)
    parted.add(1, PROMPT, sampling)
    parted.prefill([1])
    parted.decode([1], 4)
    so_far = outputs(parted, 1)
    parted.remove(1)
    parted.add(2, PROMPT, sampling, outputs=so_far)
    parted.prefill([2], 7)
    parted.decode([2], 7)
    assert outputs(parted, 2) == outputs(whole, 1)


def test_penalties_follow_the_tokens_of_every_step(checkpoints):
    """Against penalties computed from scratch on the logits of transformers."""
    run = driver(checkpoints)
    run.add(1, PROMPT, PENALISED)
    run.add(2, random_tokens(5, 9), GREEDY)
    run.prefill([1, 2])
    run.decode([1, 2], 20)
    tokens = list(PROMPT)
    for token in outputs(run, 1):
        with torch.no_grad():
            logits = checkpoints.oracle("llama")(torch.tensor([tokens])).logits[0, -1].double().numpy()
        for seen in set(tokens):
            logits[seen] = logits[seen] / 1.3 if logits[seen] > 0 else logits[seen] * 1.3
        for seen in tokens[len(PROMPT) :]:
            logits[seen] -= 0.6
        for seen in set(tokens[len(PROMPT) :]):
            logits[seen] -= 0.4
        best = np.sort(logits)[-2:]
        assert best[1] - best[0] > 1e-4
        assert token == logits.argmax()
        tokens.append(token)
    plain = driver(checkpoints)
    plain.add(1, PROMPT, GREEDY)
    plain.prefill([1])
    plain.decode([1], 20)
    assert outputs(plain, 1) != outputs(run, 1)


@pytest.mark.parametrize("chunk", [None, 6])
def test_logprobs_of_prompt_and_output(checkpoints, chunk):
    run = driver(checkpoints)
    run.add(1, PROMPT, SamplingSettings(temperature=0.0, num_logprobs=2, num_prompt_logprobs=3, prompt_logprobs_start=8))
    run.add(2, PROMPT, SamplingSettings(temperature=0.0, num_logprobs=0))
    run.prefill([1, 2], chunk)
    run.decode([1, 2], 3)
    exact = checkpoints.log_softmax("llama", run.known[1])
    prompt = [scores for piece in run.prompt_logprobs[1] for scores in piece]
    assert [scores[0][0] for scores in prompt] == PROMPT[8:]
    for position, scores in enumerate(prompt, 8):
        assert [token for token, _ in scores[1:]] == np.argsort(-exact[position - 1])[:3].tolist()
        np.testing.assert_allclose([value for _, value in scores], [exact[position - 1][token] for token, _ in scores], atol=1e-4)
    for index, step in enumerate(run.logprobs[1]):
        (scores,) = step
        assert scores[0][0] == outputs(run, 1)[index] == scores[1][0]
        assert len(scores) == 3
        assert scores[0][1] == pytest.approx(exact[len(PROMPT) - 1 + index].max(), abs=1e-4)
    assert [len(scores) for step in run.logprobs[2] for scores in step] == [1] * 4
    assert run.prompt_logprobs[2] == []


def test_results_keep_the_plans_order_and_rows_in_a_prompt_say_nothing(checkpoints):
    run = driver(checkpoints)
    for row_id in (5, 3, 9):
        run.add(row_id, PROMPT)
    results = run.step({9: 3, 5: 20, 3: 19})
    assert [(result.row_id, len(result.token_ids)) for result in results] == [(9, 0), (5, 1), (3, 0)]
    assert all(result.logprobs is None and result.prompt_logprobs is None for result in results)


def test_more_prompt_logprobs_than_fit_at_once(checkpoints, monkeypatch):
    monkeypatch.setattr("workers.runner._MAX_SCORED_ELEMENTS", 131 * 3)
    run = driver(checkpoints)
    run.add(1, PROMPT, SamplingSettings(temperature=0.0, num_prompt_logprobs=ALL_LOGPROBS, num_logprobs=ALL_LOGPROBS))
    run.prefill([1])
    np.testing.assert_allclose(run.scores(1), checkpoints.log_softmax("llama", PROMPT), atol=1e-4, rtol=0)


def test_what_a_group_needs_to_know(checkpoints):
    info = make_runner(checkpoints.folder("deepseek"), kv_memory_bytes=1 << 20, max_model_len=100).info_fields
    page_bytes = 2 * 16 * (32 + 8) * 4
    assert info["num_pages"] == (1 << 20) // page_bytes
    assert (info["block_size"], info["max_model_len"], info["vocab_size"]) == (16, 100, 131)
    assert info["compute_dtype"] == "float32"
    assert info["layout"].block_bytes == page_bytes
    assert (info["max_num_seqs"], info["max_num_batched_tokens"]) == (16, 2048)
    dense = make_runner(checkpoints.folder("llama"), kv_memory_bytes=1 << 20, max_model_len=100).info_fields
    assert [each["max_prompt_tokens_beside_outputs"] for each in (dense, info)] == [768, 1536], "experts are read whole for any step"


@pytest.mark.parametrize(("given", "device", "tokens"), [(None, "cpu", 2048), (None, "cuda", 8192), (300, "cpu", 300), (300, "cuda", 300)])
def test_the_tokens_of_a_step_depend_on_the_device_unless_given(given, device, tokens):
    assert max_batched_tokens(WorkerConfig("m", max_num_batched_tokens=given), torch.device(device)) == tokens


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens"])
def test_limits_that_could_never_serve_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        WorkerConfig("m", **{name: 0})


def test_a_pool_that_holds_no_longest_request_is_refused(checkpoints):
    with pytest.raises(NotEnoughMemory, match=r"--kv-memory of 100000 bytes holds 6 pages, but one request of 512 tokens needs 33"):
        make_runner(checkpoints.folder("llama"), kv_memory_bytes=100_000)
    assert make_runner(checkpoints.folder("llama"), kv_memory_bytes=100_000, max_model_len=80).info_fields["num_pages"] == 6


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_model_len": 513}, "--max-model-len 513"),
        ({"dtype": "int4"}, "int4"),
        ({"load_format": "pickle"}, "pickle"),
        ({"attention_backend": "none"}, "'none'"),
    ],
)
def test_settings_that_do_not_fit_are_named(checkpoints, settings, named):
    with pytest.raises(UnsupportedConfig, match=named):
        make_runner(checkpoints.folder("llama"), **settings)


def test_a_runner_can_be_closed_and_made_again(checkpoints):
    comm = Communicator.single("cpu")
    for _ in range(2):
        runner = Runner(WorkerConfig(str(checkpoints.folder("llama")), kv_memory_bytes=1 << 22), comm, lambda *progress: None)
        run = Driver(runner)
        run.add(1, PROMPT)
        run.prefill([1])
        assert len(outputs(run, 1)) == 1
        runner.close()
    comm.close()


def test_bfloat16_stays_near_float32(checkpoints):
    """Weights, pages and activations in bfloat16: scores move by what eight bits of mantissa allow, and stay finite."""
    run = driver(checkpoints, "deepseek", dtype="bfloat16")
    run.add(1, PROMPT, SamplingSettings(temperature=0.0, num_prompt_logprobs=ALL_LOGPROBS, num_logprobs=ALL_LOGPROBS))
    run.prefill([1])
    assert run.runner.pool.tensor.element_size() == 2
    assert np.median(np.abs(run.scores(1) - checkpoints.log_softmax("deepseek", PROMPT))) < 0.1
