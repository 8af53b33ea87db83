"""Llama and Mistral: grouped-query attention and a gated MLP in every layer."""

from __future__ import annotations

from torch import nn

from workers.layers.attention import GqaAttention
from workers.layers.linear import GatedMlp
from workers.layers.parameter import Placement
from workers.models.config import ModelConfig
from workers.models.decoder import DecoderLayer, DecoderModel


class Llama(DecoderModel):
    """LlamaForCausalLM, and MistralForCausalLM, which differs in its window alone; that is the attention backend's."""

    def make_layer(self, config: ModelConfig, layer: int, placement: Placement) -> nn.Module:
        attention = GqaAttention(config, layer, placement, bias=config.attention_bias)
        mlp = GatedMlp(placement, config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        return DecoderLayer(config, placement, attention, mlp)
