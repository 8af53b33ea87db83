"""The model side on CUDA against itself on the CPU: the same checkpoint, pages, plans and seeds."""

import datetime
import json

import numpy as np
import pytest
import torch
from model_driver import Driver, make_runner
from safetensors.torch import save_file

from workers.dummy import dummy_weights
from workers.layers.parameter import Placement
from workers.models.config import load_model_config
from workers.models.deepseek import Deepseek
from workers.models.llama import Llama
from workers.noise import gumbel, mix_
from workers.parallel import Communicator, _nccl_group
from workers.step import ALL_LOGPROBS, SamplingSettings
from workers.weights import wanted_parts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda", 0)
SHARED = {
    "vocab_size": 1031,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}
MODELS = {
    "llama": (Llama, {**SHARED, "architectures": ["LlamaForCausalLM"]}),
    "deepseek": (
        Deepseek,
        {
            **SHARED,
            "architectures": ["DeepseekV3ForCausalLM"],
            "kv_lora_rank": 128,
            "q_lora_rank": 96,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """A checkpoint whose random weights make attention and experts matter."""
    family, raw = MODELS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    (path / "config.json").write_text(json.dumps(raw))
    model = family(load_model_config(path), Placement(Communicator.single("cpu"), torch.float32, torch.device("cpu")), 16)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(part.shape, generator=generator) * 0.08 if len(part.shape) > 1 else torch.ones(part.shape)
        for name, part, _ in wanted_parts(model)
    }
    save_file(tensors, path / "model.safetensors")
    return path


def run_rows(folder, device, **settings) -> Driver:
    """Chunked prompts, decoding rows, a row on another's pages, greedy and random rows together."""
    run = Driver(make_runner(folder, Communicator.single(device), kv_memory_bytes=64 << 20, **settings))
    rng = np.random.RandomState(1)
    prompts = {row: rng.randint(0, 1031, length).tolist() for row, length in ((1, 150), (2, 33), (3, 7), (4, 64))}
    scored = SamplingSettings(temperature=0.0, num_logprobs=ALL_LOGPROBS, num_prompt_logprobs=ALL_LOGPROBS)
    warm = SamplingSettings(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, seed=77, repetition_penalty=1.1, frequency_penalty=0.2)
    for row, prompt in prompts.items():
        run.add(row, prompt, scored if row in (1, 4) else warm._replace(seed=row))
    run.prefill([1, 2, 3, 4], 48)
    run.decode([1, 2, 3, 4], 20)
    run.add(5, prompts[1], warm, cached=(run.pages[1][:8], 128))
    run.prefill([5])
    run.decode([5, 2], 4)
    return run


def test_float32_gives_the_tokens_of_the_cpu(folder):
    cpu, cuda = (run_rows(folder, device, dtype="float32") for device in ("cpu", CUDA))
    assert cuda.known == cpu.known
    for row in (1, 4):
        np.testing.assert_allclose(cuda.scores(row), cpu.scores(row), atol=2e-3, rtol=0)


def test_bfloat16_stays_near_float32(folder):
    """Prompt scores: what was sampled afterwards may differ."""
    exact, rounded = run_rows(folder, CUDA, dtype="float32"), run_rows(folder, CUDA)
    assert rounded.runner.info_fields["compute_dtype"] == "bfloat16"
    for row, length in ((1, 150), (4, 64)):
        drift = np.abs(rounded.scores(row)[:length] - exact.scores(row)[:length])
        assert np.isfinite(drift).all()
        assert np.median(drift) < 0.1


def test_the_same_steps_give_the_same_bits(folder):
    first, second = (run_rows(folder, CUDA) for _ in range(2))
    assert first.known == second.known
    assert first.scores(1).tobytes() == second.scores(1).tobytes()


def test_noise_and_dummy_weights_are_those_of_the_cpu(folder):
    bits = [mix_(torch.arange(1 << 16, dtype=torch.int32, device=device) * 40503) for device in ("cpu", CUDA)]
    assert torch.equal(bits[0], bits[1].cpu())
    torch.testing.assert_close(gumbel(bits[1]).cpu(), gumbel(bits[0]), rtol=1e-5, atol=1e-5)
    config = load_model_config(folder)
    family = Deepseek if config.mla else Llama
    weights = []
    for device in (torch.device("cpu"), CUDA):
        model = family(config, Placement(Communicator.single(device), torch.bfloat16, device), 16)
        dummy_weights(model, 1, lambda phase, done, total: None)
        weights.append({name: parameter.data[part.target].cpu() for name, part, parameter in wanted_parts(model)})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nccl_collectives_of_an_explicit_group():
    host = Communicator.host(1)
    group = _nccl_group(host.store, 0, 1, "127.0.0.1", CUDA, datetime.timedelta(seconds=60))
    comm = Communicator(0, 1, CUDA, group)
    assert comm.all_reduce(torch.ones(4, device=CUDA)).tolist() == [1.0] * 4
    assert comm.all_gather(torch.ones(2, 3, device=CUDA)).shape == (2, 3)
    comm.close()
    host.close()
