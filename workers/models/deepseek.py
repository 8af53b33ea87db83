"""DeepSeek-V2 and V3: latent attention; a dense MLP in the first layers, experts in the others."""

from __future__ import annotations

from torch import nn

from workers.layers.linear import GatedMlp
from workers.layers.mla import MlaAttention
from workers.layers.moe import MoeMlp
from workers.layers.parameter import Placement
from workers.models.config import ModelConfig
from workers.models.decoder import DecoderLayer, DecoderModel


class Deepseek(DecoderModel):
    """DeepseekV2ForCausalLM and DeepseekV3ForCausalLM, without the multi-token-prediction layers."""

    def make_layer(self, config: ModelConfig, layer: int, placement: Placement) -> nn.Module:
        assert config.moe
        if layer < config.moe.first_moe_layer:
            mlp: nn.Module = GatedMlp(placement, config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        else:
            mlp = MoeMlp(config.moe, config.hidden_size, placement, bias=config.mlp_bias)
        return DecoderLayer(config, placement, MlaAttention(config, layer, placement), mlp)
