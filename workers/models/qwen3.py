"""Qwen3: Llama with a norm on every query and key head."""

from __future__ import annotations

from torch import nn

from workers.layers.attention import GqaAttention
from workers.layers.linear import GatedMlp
from workers.layers.parameter import Placement
from workers.models.config import ModelConfig
from workers.models.decoder import DecoderLayer, DecoderModel


class Qwen3(DecoderModel):
    """Qwen3ForCausalLM."""

    def make_layer(self, config: ModelConfig, layer: int, placement: Placement) -> nn.Module:
        attention = GqaAttention(config, layer, placement, bias=config.attention_bias, qk_norm=True)
        return DecoderLayer(config, placement, attention, GatedMlp(placement, config.hidden_size, config.intermediate_size))
