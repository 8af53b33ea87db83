"""What decoder-only families share: pre-norm layers between an embedding and a head.

T tokens, H hidden, V vocabulary
"""

from __future__ import annotations

import abc

import torch
from torch import nn

from workers.attention.base import AttentionBackend
from workers.layers.embedding import VocabEmbedding
from workers.layers.norm import RmsNorm
from workers.layers.parameter import Placement
from workers.layers.rotary import RotaryTable
from workers.models.config import ModelConfig

Rope = tuple[torch.Tensor, torch.Tensor]


class DecoderLayer(nn.Module):
    """Attention, then MLP, each on normed input and added to the stream."""

    def __init__(self, config: ModelConfig, placement: Placement, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RmsNorm(placement, config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(placement, config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_TH: torch.Tensor, delta_TH: torch.Tensor | None, rope: Rope, backend: AttentionBackend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the stream and what the layer before wants added to it, and returns the like: a norm does the addition in passing."""
        normed_TH, x_TH = self.input_layernorm.add(x_TH, delta_TH)
        normed_TH, x_TH = self.post_attention_layernorm.add(x_TH, self.self_attn(normed_TH, rope, backend))
        return x_TH, self.mlp(normed_TH)


class DecoderModel(nn.Module, abc.ABC):
    """A stack of decoder layers between an embedding and a head. Families say how a layer is made."""

    def __init__(self, config: ModelConfig, placement: Placement, max_model_len: int) -> None:
        super().__init__()
        rope_dim = config.mla.rope_dim if config.mla else config.head_dim
        self._rotary = RotaryTable(config.rope, rope_dim, max_model_len, placement.dtype, placement.device)
        self.embed_tokens = VocabEmbedding(placement, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([self.make_layer(config, layer, placement) for layer in range(config.num_layers)])
        self.norm = RmsNorm(placement, config.hidden_size, config.rms_norm_eps)
        self.lm_head = self.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = VocabEmbedding(placement, config.vocab_size, config.hidden_size, only_scores=True)

    @abc.abstractmethod
    def make_layer(self, config: ModelConfig, layer: int, placement: Placement) -> nn.Module:
        """Layer number `layer`, a module called as DecoderLayer is."""

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, backend: AttentionBackend) -> torch.Tensor:
        """Hidden states [T, H] before the last norm. `backend.begin` has been called for the step."""
        rope = self._rotary.at(positions_T)
        x_TH, delta_TH = self.embed_tokens(ids_T), None
        for layer in self.layers:
            x_TH, delta_TH = layer(x_TH, delta_TH, rope, backend)
        return x_TH if delta_TH is None else x_TH + delta_TH

    def logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Scores [T, V] in float32, on every rank."""
        return self.lm_head.logits(self.norm(x_TH)).float()
