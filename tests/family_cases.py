"""The dimensions of the family matrix, and the cases that cover them: each family meets every value of every other dimension."""

from __future__ import annotations

from typing import Any, NamedTuple

_LATENT = {
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 30,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_GROUPS = {"n_group": 4, "topk_group": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # shapes that two or four ranks do not divide, wherever that is allowed
    "Llama": (
        "Llama",
        {"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    ),
    "Mistral": ("Mistral", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 19}),
    "Mistral without window": ("Mistral", {"num_key_value_heads": 8, "sliding_window": None}),
    "Qwen2": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
    "Qwen3 with window": (
        "Qwen3",
        {"num_key_value_heads": 4, "head_dim": 12, "use_sliding_window": True, "sliding_window": 30, "max_window_layers": 0},
    ),
    "DeepSeek-V2-Lite": ("DeepseekV2", {**_LATENT, "q_lora_rank": None, "topk_method": "greedy", "qk_rope_head_dim": 10}),
    "DeepSeek-V2": (
        "DeepseekV2",
        {**_LATENT, **_GROUPS, "q_lora_rank": 20, "topk_method": "group_limited_greedy", "mlp_bias": True, "routed_scaling_factor": 4.0},
    ),
    "DeepSeek-V3": ("DeepseekV3", {**_LATENT, **_GROUPS, "q_lora_rank": 20, "attention_bias": True, "routed_scaling_factor": 2.5}),
}
SIZES = {"intermediate_size": 90, "num_hidden_layers": 2}  # with checkpoints' own: 131 tokens of vocabulary

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 0.7},
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 128},
}
FORMS = (4, 5)  # of config.json: the major version of transformers
TP_SIZES = (1, 2, 4)
WAYS = ("cold", "pages", "store")


class Case(NamedTuple):
    family: str
    rope: str
    form: int
    tp: int
    store_tp: int | None  # None: not answered from the store


def cases() -> list[Case]:
    """Every rope with every family; the other dimensions take turns, shifted from family to family."""
    made = []
    for shift, family in enumerate(FAMILIES):
        for index, rope in enumerate(ROPES):
            turn = index + shift
            store_tp = TP_SIZES[(turn + 1) % 3] if index % 2 == 0 else None
            made.append(Case(family, rope, FORMS[(index + shift // 2) % 2], TP_SIZES[turn % 3], store_tp))
    return made
