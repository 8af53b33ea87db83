"""The configs of published checkpoints, shortened to what is read, against the figures that are known of these models."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import CheckpointError
from workers.kv.layout import page_layout
from workers.layers.parameter import Placement
from workers.layers.rotary import inverse_frequencies
from workers.models.build import outline
from workers.models.config import load_model_config
from workers.parallel import Communicator
from workers.weights import wanted_parts

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, positions: int) -> dict[str, object]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-6,
    }


def experts(intermediate: int, routed: int, shared: int, chosen: int, groups: tuple[int, int], dense: int) -> dict[str, object]:
    return {
        "moe_intermediate_size": intermediate,
        "n_routed_experts": routed,
        "n_shared_experts": shared,
        "num_experts_per_tok": chosen,
        "n_group": groups[0],
        "topk_group": groups[1],
        "first_k_dense_replace": dense,
    }


CONFIGS = {
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        **sizes(4096, 14336, 32, 32, 8, 128256, 131072),
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "eos_token_id": [128001, 128008, 128009],
    },
    "Mistral-7B-v0.1": {"architectures": ["MistralForCausalLM"], **sizes(4096, 14336, 32, 32, 8, 32000, 32768), "sliding_window": 4096},
    "Mistral-7B-v0.3": {"architectures": ["MistralForCausalLM"], **sizes(4096, 14336, 32, 32, 8, 32768, 32768), "sliding_window": None},
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        **sizes(3584, 18944, 28, 28, 4, 152064, 131072),
        "sliding_window": 131072,
        "max_window_layers": 28,
        "use_sliding_window": False,
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        **sizes(4096, 12288, 36, 32, 8, 151936, 40960),
        "head_dim": 128,
        "sliding_window": None,
        "max_window_layers": 36,
        "use_sliding_window": False,
        "attention_bias": False,
    },
    "DeepSeek-V2-Lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        **sizes(2048, 10944, 27, 16, 16, 102400, 163840),
        **LATENT,
        **experts(1408, 64, 2, 6, (1, 1), 1),
        "q_lora_rank": None,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepSeek-V2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        **sizes(5120, 12288, 60, 128, 128, 102400, 163840),
        **LATENT,
        **experts(1536, 160, 2, 6, (8, 3), 1),
        "q_lora_rank": 1536,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        **sizes(7168, 18432, 61, 128, 128, 129280, 163840),
        **LATENT,
        **experts(2048, 256, 1, 8, (8, 4), 3),
        "q_lora_rank": 1536,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}
BILLION_PARAMETERS = {
    "Llama-3.1-8B": 8.03,
    "Mistral-7B-v0.1": 7.24,
    "Mistral-7B-v0.3": 7.25,
    "Qwen2.5-7B": 7.62,
    "Qwen3-8B": 8.19,
    "DeepSeek-V2-Lite": 15.7,
    "DeepSeek-V2": 235.7,
    "DeepSeek-V3": 671.0,
}
CACHED_BYTES_PER_TOKEN = {  # bfloat16
    "Llama-3.1-8B": 131_072,
    "Qwen2.5-7B": 57_344,
    "DeepSeek-V2-Lite": 31_104,
    "DeepSeek-V2": 69_120,
    "DeepSeek-V3": 70_272,
}
SOFTMAX_SCALE = {"DeepSeek-V2-Lite": 0.114721, "DeepSeek-V2": 0.135234, "DeepSeek-V3": 0.135234, "Llama-3.1-8B": 128**-0.5}
WINDOW = {"Mistral-7B-v0.1": 4096}


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.sampled_from([10**400, -(10**400)])
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["yarn", "longrope", "dynamic", "fp8", "float16", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*YARN, *LLAMA3, "short_factor", "rope_theta"]), inner, max_size=5)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(CONFIGS)), data=st.data())
def test_whatever_stands_in_a_field_is_read_or_named(tmp_path_factory, name, data):
    """Any value in any field: a config that the layers could be built from, or an error of ours that names the file."""
    known = {field for config in CONFIGS.values() for field in config} | {
        "head_dim",
        "layer_types",
        "hidden_act",
        "rope_parameters",
        "dtype",
    }
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(known)), ANYTHING, min_size=1, max_size=3))
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps({**CONFIGS[name], **changes}))
    try:
        config = load_model_config(folder)
    except CheckpointError as error:
        named = str(error)
    else:
        named = str(folder)
        assert config.block_digest_input()
        assert config.softmax_scale > 0
        frequencies, scale = inverse_frequencies(config.rope, 16 if config.rope.kind != "longrope" else 2 * len(config.rope.short_factor))
        assert bool(frequencies.isfinite().all())
        assert scale > 0
    assert str(folder) in named


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_known_of_a_model_comes_out(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    config = load_model_config(tmp_path)
    cpu = torch.device("cpu")
    model = outline(config, Placement(Communicator.single(cpu), torch.bfloat16, cpu))
    shapes = {tensor: part.shape for tensor, part, _ in wanted_parts(model)}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(BILLION_PARAMETERS[name], rel=0.005)
    layout = page_layout(config, block_size=None, dtype="bfloat16", tensor_parallel_size=1, rank=0)
    assert layout.page_bytes / layout.block_size == CACHED_BYTES_PER_TOKEN.get(name, layout.page_bytes / layout.block_size)
    assert config.softmax_scale == pytest.approx(SOFTMAX_SCALE.get(name, config.softmax_scale), abs=1e-6)
    assert config.window == WINDOW.get(name)
