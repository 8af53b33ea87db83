"""Qwen2: Llama with biases on queries, keys and values, always."""

from __future__ import annotations

from torch import nn

from workers.layers.attention import GqaAttention
from workers.layers.linear import GatedMlp
from workers.layers.parameter import Placement
from workers.models.config import ModelConfig
from workers.models.decoder import DecoderLayer, DecoderModel


class Qwen2(DecoderModel):
    """Qwen2ForCausalLM."""

    def make_layer(self, config: ModelConfig, layer: int, placement: Placement) -> nn.Module:
        attention = GqaAttention(config, layer, placement, qkv_bias=True)
        return DecoderLayer(config, placement, attention, GatedMlp(placement, config.hidden_size, config.intermediate_size))
