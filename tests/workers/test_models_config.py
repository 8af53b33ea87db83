"""config.json in both spellings, ropes against transformers, and a named error for everything that cannot be served."""

import json
from types import SimpleNamespace

import pytest
import torch
from checkpoints import CONFIGS
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from workers.errors import CheckpointError, UnknownArchitecture, UnsupportedConfig
from workers.layers.rotary import inverse_frequencies
from workers.models.config import MoeConfig, RopeConfig, check_tensor_parallel, kv_heads_of_rank, load_model_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": [1, 2],
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
DEEPSEEK = {
    **LLAMA,
    "architectures": ["DeepseekV3ForCausalLM"],
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}


@pytest.fixture
def load(tmp_path):
    def write_and_load(raw):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return load_model_config(tmp_path)

    return write_and_load


def test_both_spellings_read_alike(load):
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
    old = load({**LLAMA, "rope_theta": 5e5, "torch_dtype": "bfloat16", "rope_scaling": {"type": "llama3", **rope}})
    new = load({**LLAMA, "dtype": "bfloat16", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **rope}})
    assert old == new
    assert old.dtype == "bfloat16"
    assert old.rope == RopeConfig("llama3", 5e5, 8.0, 1024, None, 1.0, 4.0)
    assert (old.codec, old.head_dim, old.eos_token_ids, old.max_model_len) == ("gqa", 8, (1, 2), 4096)


def test_latent_attention_and_experts(load):
    config = load(DEEPSEEK)
    assert config.codec == "mla"
    assert config.moe == MoeConfig(16, 4, 1, 32, 4, 2, 1, True, 1.0)
    assert config.softmax_scale == pytest.approx(24**-0.5)
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    published = {**DEEPSEEK, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": yarn}
    assert load(published).softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert load({**published, "rope_scaling": {**yarn, "mscale_all_dim": 0.707}}).softmax_scale == pytest.approx(0.114721, abs=1e-6)


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 256, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn without mscale": {"factor": 16.0, "original_max_position_embeddings": 256, "beta_fast": 16, "truncate": False},
    "yarn by attention factor": {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 1.25},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [9.0] * 8,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_frequencies_are_those_of_transformers(load, name, caplog):
    kind = name.split()[0]
    parameters = {"rope_type": kind, "rope_theta": 1e4, **ROPES[name]}
    ours = load({**LLAMA, "head_dim": 16, "rope_parameters": parameters})
    config = LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "architectures"}, head_dim=16, rope_parameters=parameters)
    init = ROPE_INIT_FUNCTIONS.get(kind)
    if init is None:
        expected, scale = 1e4 ** (-torch.arange(0, 16, 2) / 16), 1.0
    else:
        expected, scale = init(config)
    frequencies, our_scale = inverse_frequencies(ours.rope, 16)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert our_scale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(("kind", "limit"), [("dynamic", 4096), ("longrope", 1024)])
def test_ropes_whose_keys_depend_on_the_length_end_at_the_original_context(load, kind, limit):
    rope = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 1024, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = load({**LLAMA, "rope_parameters": rope})
    assert config.max_model_len == limit
    assert kind in config.notes[0]


@pytest.mark.parametrize(
    ("raw", "error", "named"),
    [
        ({**LLAMA, "architectures": ["GPT2LMHeadModel"]}, UnknownArchitecture, "GPT2LMHeadModel"),
        ({**LLAMA, "architectures": None}, UnknownArchitecture, "LlamaForCausalLM"),
        ({**LLAMA, "hidden_act": "gelu"}, UnsupportedConfig, "gelu"),
        ({**LLAMA, "layer_types": ["full_attention", "sliding_attention"]}, UnsupportedConfig, "sliding_attention"),
        ({**LLAMA, "use_sliding_window": True, "sliding_window": 128}, UnsupportedConfig, "use_sliding_window"),
        ({**LLAMA, "rope_scaling": {"type": "su"}}, UnsupportedConfig, "'su'"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, UnsupportedConfig, "partial_rotary_factor"),
        ({**LLAMA, "dtype": "float64"}, UnsupportedConfig, "float64"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, UnsupportedConfig, "gptq"),
        ({**LLAMA, "num_key_value_heads": 3}, UnsupportedConfig, "num_key_value_heads"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, UnsupportedConfig, "full_attention"),
        ({**QWEN2, "layer_types": ["sliding_attention"] * 2}, UnsupportedConfig, "layer_types"),
        ({**MISTRAL, "layer_types": ["full_attention", "sliding_attention"]}, UnsupportedConfig, "layer_types"),
        ({**MISTRAL, "sliding_window": 0}, CheckpointError, "sliding_window"),
        ({**LLAMA, "head_dim": 7}, UnsupportedConfig, "odd"),
        ({**LLAMA, "rope_scaling": {"type": "llama3", "factor": 8.0}}, CheckpointError, "rope_scaling.low_freq_factor"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, CheckpointError, "rope_scaling.factor"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": "8"}}, CheckpointError, "'8'"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": float("nan")}}, CheckpointError, "factor"),
        ({**LLAMA, "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, CheckpointError, "4 numbers"),
        ({**LLAMA, "rope_scaling": [4]}, CheckpointError, "rope_scaling"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, UnsupportedConfig, "per kind of layer"),
        ({**LLAMA, "tie_word_embeddings": "yes"}, CheckpointError, "tie_word_embeddings"),
        ({**LLAMA, "vocab_size": 1 << 50}, CheckpointError, "vocab_size"),
        ({**LLAMA, "hidden_size": None}, CheckpointError, "hidden_size"),
        ({**LLAMA, "num_hidden_layers": "two"}, CheckpointError, "num_hidden_layers"),
        ({**LLAMA, "eos_token_id": "</s>"}, CheckpointError, "eos_token_id"),
        ({**DEEPSEEK, "scoring_func": "softmax"}, UnsupportedConfig, "scoring_func"),
        ({**DEEPSEEK, "topk_method": "greedy"}, UnsupportedConfig, "topk_method"),
        ({**DEEPSEEK, "n_group": 16}, UnsupportedConfig, "n_group"),
        ({**DEEPSEEK, "n_group": None}, CheckpointError, "n_group"),
        ({**DEEPSEEK, "qk_rope_head_dim": 7}, UnsupportedConfig, "odd"),
        ({**DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "sigmoid"}, UnsupportedConfig, "scoring_func"),
        ({**DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "noaux_tc"}, UnsupportedConfig, "topk_method"),
        ({**DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "norm_topk_prob": True}, UnsupportedConfig, "norm_topk_prob"),
        ({**DEEPSEEK, "num_experts_per_tok": 9}, UnsupportedConfig, "topk_group"),
        ([], CheckpointError, "JSON object"),
    ],
)
def test_what_cannot_be_served_is_named(load, raw, error, named):
    with pytest.raises(error, match="config.json") as caught:
        load(raw)
    assert type(caught.value) is error
    assert named in str(caught.value)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model_config(tmp_path)


def test_tensor_parallel_sizes(load):
    llama, deepseek = load(LLAMA), load(DEEPSEEK)
    for size in (1, 2, 4, 8):
        check_tensor_parallel(llama, size)
        check_tensor_parallel(deepseek, size)
    for size, named in ((3, "num_attention_heads 8"), (0, "num_attention_heads"), (16, "num_attention_heads")):
        with pytest.raises(UnsupportedConfig, match=named):
            check_tensor_parallel(llama, size)
    check_tensor_parallel(load({**DEEPSEEK, "moe_intermediate_size": 33, "intermediate_size": 7}), 8)  # these may be cut unevenly


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (8, 2), (12, 3), (20, 4), (6, 1), (15, 5)])
def test_every_rank_has_the_key_value_heads_of_its_queries(load, num_heads, num_kv_heads):
    config = load({**LLAMA, "head_dim": 8, "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads})
    group = num_heads // num_kv_heads
    for tp in (size for size in range(1, num_heads + 1) if num_heads % size == 0):
        per_rank = num_heads // tp
        for rank in range(tp):
            wanted = {head // group for head in range(rank * per_rank, (rank + 1) * per_rank)}
            assert set(kv_heads_of_rank(config, tp, rank)) == wanted


@pytest.mark.parametrize(
    ("raw", "window"),
    [
        (MISTRAL, 4096),  # the family's default
        ({**MISTRAL, "sliding_window": None}, None),
        ({**MISTRAL, "sliding_window": 100}, 100),
        ({**MISTRAL, "sliding_window": 32768}, None),  # hides nothing
        ({**QWEN2, "sliding_window": 100}, None),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}, 100),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2}, None),  # of 2 layers
        ({**QWEN2, "use_sliding_window": True, "sliding_window": None}, None),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 100, "layer_types": ["sliding_attention"] * 2}, 100),
        ({**QWEN2, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_windows(load, raw, window):
    assert load(raw).window == window
    assert (b'"window":null' in load(raw).block_digest_input()) == (window is None)


def test_experts_of_deepseek_v2(load):
    v2 = {**DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax", "norm_topk_prob": False}
    grouped = load({**v2, "topk_method": "group_limited_greedy", "rope_interleave": False})
    assert grouped.moe == MoeConfig(16, 4, 1, 32, 4, 2, 1, False, 1.0, "softmax")
    assert grouped.mla.rope_interleave
    assert load({**v2, "topk_method": "greedy", "n_group": None, "topk_group": None}).moe == MoeConfig(
        16, 4, 1, 32, 1, 1, 1, False, 1.0, "softmax"
    )


def test_settings_of_other_families_mean_nothing(load):
    for raw in (QWEN2, MISTRAL):
        config = load({**raw, "attention_bias": True, "mlp_bias": True})
        assert (config.attention_bias, config.mlp_bias) == (False, False)
    assert load({**QWEN2, "architectures": ["Qwen3ForCausalLM"], "attention_bias": True}).head_dim == 128


def test_the_digest_input_holds_what_decides_a_block_and_nothing_else(load):
    base = load(LLAMA).block_digest_input()
    for same in ({"eos_token_id": 5}, {"max_position_embeddings": 4096, "dtype": "float16"}, {"bos_token_id": 0}):
        assert load({**LLAMA, **same}).block_digest_input() == base
    for other in ({"rope_theta": 5e5}, {"rms_norm_eps": 1e-5}, {"num_key_value_heads": 4}, {"architectures": ["Qwen3ForCausalLM"]}):
        assert load({**LLAMA, **other}).block_digest_input() != base


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_is_read(checkpoints, name):
    config = load_model_config(checkpoints.folder(name))
    oracle = SimpleNamespace(**json.loads((checkpoints.folder(name) / "config.json").read_text()))
    assert config.vocab_size == oracle.vocab_size
    assert config.num_layers == oracle.num_hidden_layers
    assert config.tie_word_embeddings == oracle.tie_word_embeddings
    assert config.rope.kind == oracle.rope_parameters["rope_type"]
