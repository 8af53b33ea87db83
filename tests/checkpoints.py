"""Small random checkpoints in every shape that is served, with transformers as their oracle. Each is made once per test session."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

_SHARED = {
    "vocab_size": 131,  # divided by no tensor-parallel size
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
_LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4, "head_dim": 16}),
    "llama-tied-bias": (
        "Llama",
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    ),
    "qwen3": (
        "Qwen3",
        {"num_key_value_heads": 8, "head_dim": 16, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    # 12 query heads of 8, groups of 4: two or four ranks cut them
    "llama-cut-groups": (
        "Llama",
        {"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 90},
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 0, "intermediate_size": 97},
    ),
    "deepseek-v2-lite": (
        "DeepseekV2",
        {
            **_LATENT,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "qk_rope_head_dim": 6,
            "moe_intermediate_size": 30,
            "routed_scaling_factor": 1.0,
        },
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {**_LATENT, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "mlp_bias": True, "rope_parameters": _YARN},
    ),
    "deepseek": ("DeepseekV3", {**_LATENT, "q_lora_rank": 24, "rope_parameters": _YARN}),
    "deepseek-plain-q": ("DeepseekV3", {**_LATENT, "q_lora_rank": None, "attention_bias": True, "rope_interleave": False}),
}


def make_model(family: str, settings: dict[str, Any]) -> Any:
    """A transformers model with random weights; norms and biases are not at their neutral values. The weights depend on shapes alone."""
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**_SHARED, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if parameter_name.endswith(("norm.weight", "layernorm.weight")):
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith(("bias", "e_score_correction_bias")):
                parameter.normal_(0, 0.2)
    return model


class Expected(NamedTuple):
    """A greedy answer of transformers."""

    token_ids: list[int]
    scores: np.ndarray  # log-softmax, [prompt + outputs - 1, vocabulary]


class Checkpoints:
    """Folders and oracles by name of `CONFIGS`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = functools.cache(self._folder)
        self.oracle = functools.cache(self._oracle)
        self.expected = functools.cache(self._expected)

    def _folder(self, name: str) -> Path:
        folder = self._root / name
        make_model(*CONFIGS[name]).save_pretrained(folder)
        return folder

    def _oracle(self, name: str) -> Any:
        import transformers

        family = CONFIGS[name][0]
        return getattr(transformers, f"{family}ForCausalLM").from_pretrained(self.folder(name), experts_implementation="eager").eval()

    def _expected(self, name: str, prompt: tuple[int, ...], num_tokens: int) -> Expected:
        """What `prompt` is answered with, where no best two logits are closer than 1e-3."""
        token_ids = self.greedy(name, list(prompt), num_tokens, min_gap=1e-3)
        return Expected(token_ids, self.log_softmax(name, [*prompt, *token_ids[:-1]]))

    def log_softmax(self, name: str, tokens: list[int]) -> np.ndarray:
        """[tokens, vocabulary], by transformers."""
        with torch.no_grad():
            return np.asarray(self.oracle(name)(torch.tensor([tokens])).logits[0].log_softmax(-1))

    def greedy(self, name: str, prompt: list[int], num_tokens: int, *, min_gap: float) -> list[int]:
        """Greedy output by transformers; fails when the best two logits are ever closer than `min_gap`, where equality would be luck."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            scores_V = self.log_softmax(name, tokens)[-1]
            second, best = np.argsort(scores_V)[-2:]
            assert scores_V[best] - scores_V[second] > min_gap, "choose another prompt"
            tokens.append(int(best))
        return tokens[len(prompt) :]


def random_tokens(length: int, seed: int, vocab_size: int = 131) -> list[int]:
    return np.random.RandomState(seed).randint(0, vocab_size, length).tolist()


# Longer than the original context of both scaled ropes; the second is a whole number of blocks of 16, whose last one may not be reused.
PARITY_PROMPTS = (tuple(random_tokens(91, seed=1)), tuple(random_tokens(80, seed=5)))
