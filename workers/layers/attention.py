"""Grouped-query attention: projections and rope around a backend that keeps keys and values.

T tokens, H hidden, N query heads, K key-value heads, M = N + 2K, D dimensions of a head
"""

from __future__ import annotations

import torch
from torch import nn

from workers.attention.base import AttentionBackend, Rope
from workers.layers.linear import ColumnLinear, RowLinear
from workers.layers.norm import RmsNorm
from workers.layers.parameter import Placement, Share
from workers.models.config import ModelConfig, kv_heads_of_rank


class GqaAttention(nn.Module):
    """Heads split over the ranks. Where the queries of one key-value head span ranks, each of these computes that head."""

    def __init__(
        self, config: ModelConfig, layer: int, placement: Placement, *, qkv_bias: bool = False, bias: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self._layer = layer
        self._head_dim = config.head_dim
        heads, kv_heads = placement.share(config.num_heads), kv_head_share(config, placement)
        self._num_heads, self._num_kv_heads = heads.size, kv_heads.size
        q, kv = (Share(s.total * config.head_dim, s.start * config.head_dim, s.stop * config.head_dim) for s in (heads, kv_heads))
        self.qkv_proj = ColumnLinear(placement, config.hidden_size, [q, kv, kv], bias=qkv_bias or bias)
        self.o_proj = RowLinear(placement, q, config.hidden_size, bias=bias)
        self.q_norm = RmsNorm(placement, config.head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RmsNorm(placement, config.head_dim, config.rms_norm_eps) if qk_norm else None

    def prepare(self, x_TH: torch.Tensor, rope: Rope, backend: AttentionBackend) -> torch.Tensor:
        """Queries [T, N, D]; keys and values are in their pages afterwards."""
        qkv_TMD = self.qkv_proj(x_TH).view(x_TH.shape[0], -1, self._head_dim)
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.q_norm is not None and self.k_norm is not None else None
        backend.rotate_and_write_gqa(self._layer, qkv_TMD, rope, norms)
        return qkv_TMD[:, : self._num_heads]

    def attend(self, q_TND: torch.Tensor, backend: AttentionBackend) -> torch.Tensor:
        """[T, N * D]"""
        backend.await_pages(self._layer)
        return backend.gqa(self._layer, q_TND).flatten(1)

    def finish(self, out_TO: torch.Tensor) -> torch.Tensor:
        """[T, H]"""
        return self.o_proj(out_TO)


def kv_head_share(config: ModelConfig, placement: Placement) -> Share:
    """The key-value heads of this rank; neighbours may have its first and last one too."""
    heads = kv_heads_of_rank(config, placement.comm.world_size, placement.comm.rank)
    return Share(config.num_kv_heads, heads.start, heads.stop)
