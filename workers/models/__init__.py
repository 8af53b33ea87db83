"""Model families. One line here per architecture, and one file where no other's structure fits; files are imported when a checkpoint
asks for them. `mobula models` prints this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """What the reader of config.json has to know of an architecture. The structure itself is in `implementation`."""

    title: str
    implementation: str  # "module:class"
    codec: str = "gqa"  # or "mla"
    routing: str = ""  # of experts: "softmax" (DeepSeek-V2) or "sigmoid" (DeepSeek-V3)
    biases: tuple[str, ...] = ()  # settings of config.json that add biases; a setting that is not listed means nothing to the family
    window: str = ""  # "every layer": `sliding_window` says it; "by setting": only with `use_sliding_window`
    head_dim: int = 0  # where config.json has none; 0: hidden_size / num_attention_heads


MODELS: dict[str, Family] = {
    "LlamaForCausalLM": Family("Llama 2, 3", "workers.models.llama:Llama", biases=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family("Mistral", "workers.models.llama:Llama", window="every layer"),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5", "workers.models.qwen2:Qwen2", window="by setting"),
    "Qwen3ForCausalLM": Family("Qwen3", "workers.models.qwen3:Qwen3", biases=("attention_bias",), window="by setting", head_dim=128),
    "DeepseekV2ForCausalLM": Family(
        "DeepSeek-V2, V2-Lite", "workers.models.deepseek:Deepseek", "mla", "softmax", biases=("attention_bias", "mlp_bias")
    ),
    "DeepseekV3ForCausalLM": Family("DeepSeek-V3, R1", "workers.models.deepseek:Deepseek", "mla", "sigmoid", biases=("attention_bias",)),
}
