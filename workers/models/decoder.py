"""What decoder-only families share: pre-norm layers between an embedding and a head.

T tokens, H hidden, V vocabulary
"""

from __future__ import annotations

import abc
from typing import Protocol

import torch
from torch import nn

from workers.attention.base import AttentionBackend, Rope
from workers.layers.embedding import VocabEmbedding
from workers.layers.norm import RmsNorm
from workers.layers.parameter import Placement
from workers.layers.rotary import RotaryTable
from workers.models.config import ModelConfig


class Attention(Protocol):
    """Attention in three parts, so that what is before and after the middle one may be captured for any batch of as many tokens."""

    def prepare(self, x_TH: torch.Tensor, rope: Rope, backend: AttentionBackend) -> torch.Tensor:
        """Queries; keys and values are written to their pages."""
        ...

    def attend(self, queries: torch.Tensor, backend: AttentionBackend) -> torch.Tensor:
        """[T, O]; depends on the rows of the batch."""
        ...

    def finish(self, out_TO: torch.Tensor) -> torch.Tensor:
        """[T, H]"""
        ...


class DecoderLayer(nn.Module):
    """Attention, then MLP, each on normed input and added to the stream. What a layer wants added goes on beside the stream: the norm of
    the next one does the addition in passing."""

    def __init__(self, config: ModelConfig, placement: Placement, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn: Attention = attention  # type: ignore[assignment]  # a module that is one
        self.mlp = mlp
        self.input_layernorm = RmsNorm(placement, config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(placement, config.hidden_size, config.rms_norm_eps)

    def before(
        self, x_TH: torch.Tensor, delta_TH: torch.Tensor | None, rope: Rope, backend: AttentionBackend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, and the stream."""
        normed_TH, x_TH = self.input_layernorm.add(x_TH, delta_TH)
        return self.self_attn.prepare(normed_TH, rope, backend), x_TH

    def after(self, x_TH: torch.Tensor, out_TO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream, and what the MLP wants added."""
        normed_TH, x_TH = self.post_attention_layernorm.add(x_TH, self.self_attn.finish(out_TO))
        return x_TH, self.mlp(normed_TH)

    def forward(
        self, x_TH: torch.Tensor, delta_TH: torch.Tensor | None, rope: Rope, backend: AttentionBackend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        queries, x_TH = self.before(x_TH, delta_TH, rope, backend)
        return self.after(x_TH, self.self_attn.attend(queries, backend))


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
        rope = self.rope(positions_T)
        x_TH, delta_TH = self.embed_tokens(ids_T), None
        for layer in self.layers:
            x_TH, delta_TH = layer(x_TH, delta_TH, rope, backend)
        return x_TH if delta_TH is None else x_TH + delta_TH

    def rope(self, positions_T: torch.Tensor) -> Rope:
        """cos and sin of a step's tokens."""
        return self._rotary.at(positions_T)

    def logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Scores [T, V] in float32, on every rank."""
        return self.lm_head.logits(self.norm(x_TH))
