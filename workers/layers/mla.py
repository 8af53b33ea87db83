"""Multi-head latent attention (arXiv 2405.04434, section 2.1): pages hold one normed latent and one rotated rope key per token.

Two exact forms over the same pages. Absorbed: queries are taken into the latent space, keys and values are the latents. Plain: latents
are projected up to keys and values per head. Per query-key pair the absorbed form costs more, but the plain one first projects every key.

T tokens, H hidden, N heads on this rank, D = nope + rope dimensions of a query, C latent, P = latent + rope, V value dimensions
"""

from __future__ import annotations

import torch
from torch import nn

from workers.attention.base import AttentionBackend, Rope
from workers.layers.linear import ColumnLinear, RowLinear
from workers.layers.norm import RmsNorm
from workers.layers.parameter import Placement, Share, whole
from workers.models.config import ModelConfig

_LATENT_NORM_EPS = 1e-6  # transformers leaves these two norms at their class default, whatever rms_norm_eps says


class MlaAttention(nn.Module):
    """Heads split over the ranks; the latent is computed by each."""

    def __init__(self, config: ModelConfig, layer: int, placement: Placement) -> None:
        super().__init__()
        assert config.mla
        mla = self._mla = config.mla
        self._layer = layer
        self.absorb: bool | None = None  # None: whichever is cheaper per row
        heads = placement.share(config.num_heads)
        self._num_heads = heads.size
        query_dim, up_dim, latent = mla.nope_dim + mla.rope_dim, mla.nope_dim + mla.v_dim, mla.kv_lora_rank + mla.rope_dim
        queries, ups, values = (Share(heads.total * d, heads.start * d, heads.stop * d) for d in (query_dim, up_dim, mla.v_dim))
        bias = config.attention_bias
        if mla.q_lora_rank is None:
            self.q_kv_a_proj = ColumnLinear(placement, config.hidden_size, [queries, whole(latent)], bias=[False, bias])
        else:
            self.qkv_a_proj = ColumnLinear(placement, config.hidden_size, [whole(mla.q_lora_rank), whole(latent)], bias=bias)
            self.q_a_layernorm = RmsNorm(placement, mla.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = ColumnLinear(placement, mla.q_lora_rank, [queries])
        self.kv_a_layernorm = RmsNorm(placement, mla.kv_lora_rank, _LATENT_NORM_EPS)
        self.kv_b_proj = ColumnLinear(placement, mla.kv_lora_rank, [ups], plain=True)  # both forms of attention take it apart
        self.o_proj = RowLinear(placement, values, config.hidden_size, bias=bias)

    def prepare(self, x_TH: torch.Tensor, rope: Rope, backend: AttentionBackend) -> torch.Tensor:
        """Queries [T, N, D]; latents and rope keys are in their pages afterwards."""
        q_TND, latent_TP = self._project(x_TH)
        norm = (self.kv_a_layernorm.weight, self.kv_a_layernorm.eps)
        backend.rotate_and_write_mla(self._layer, q_TND, latent_TP, rope, norm, self._mla.rope_interleave)
        return q_TND

    def attend(self, q_TND: torch.Tensor, backend: AttentionBackend) -> torch.Tensor:
        """[T, N * V]"""
        backend.await_pages(self._layer)
        num_absorbed_rows = self._num_absorbed_rows(backend)
        rows = range(backend.batch.num_rows)
        first_plain = backend.batch.query_starts[num_absorbed_rows]
        parts = []
        if num_absorbed_rows:
            parts.append(self._absorbed(q_TND[:first_plain], rows[:num_absorbed_rows], backend))
        if num_absorbed_rows < len(rows):
            up_OC = self.kv_b_proj.weight
            parts.append(backend.mla_plain(self._layer, q_TND[first_plain:], up_OC, self._mla.v_dim, rows[num_absorbed_rows:]))
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).flatten(1)

    def finish(self, out_TO: torch.Tensor) -> torch.Tensor:
        """[T, H]"""
        return self.o_proj(out_TO)

    def _project(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._mla.q_lora_rank is None:
            q, latent_TP = self.q_kv_a_proj(x_TH).split(self.q_kv_a_proj.sizes, dim=1)
        else:
            q_a, latent_TP = self.qkv_a_proj(x_TH).split(self.qkv_a_proj.sizes, dim=1)
            q = self.q_b_proj(self.q_a_layernorm(q_a))
        return q.unflatten(1, (self._num_heads, -1)), latent_TP

    def _num_absorbed_rows(self, backend: AttentionBackend) -> int:
        """Rows come in ascending number of queries; those up to the break-even of the two forms' multiplications per key are absorbed, and
        all that are captured: the plain form takes as many keys as there are."""
        batch = backend.batch
        if batch.is_captured:
            return batch.num_rows
        if self.absorb is not None:
            return batch.num_rows if self.absorb else 0
        mla = self._mla
        projection = mla.kv_lora_rank * (mla.nope_dim + mla.v_dim)
        extra_per_query = 2 * mla.kv_lora_rank - mla.nope_dim - mla.v_dim
        count = batch.num_decode_rows
        while count < batch.num_rows and batch.num_queries(count) * extra_per_query <= projection:
            count += 1
        return count

    def _absorbed(self, q_TND: torch.Tensor, rows: range, backend: AttentionBackend) -> torch.Tensor:
        nope_dim = self._mla.nope_dim
        up_NOC = self.kv_b_proj.weight.view(self._num_heads, -1, self._mla.kv_lora_rank)
        q_NTC = torch.bmm(q_TND[..., :nope_dim].transpose(0, 1), up_NOC[:, :nope_dim])
        out_TNC = backend.mla_absorbed(self._layer, q_NTC.transpose(0, 1), q_TND[..., nope_dim:], rows)
        out_TNV = q_TND.new_empty((*out_TNC.shape[:2], self._mla.v_dim))
        torch.bmm(out_TNC.transpose(0, 1), up_NOC[:, nope_dim:].transpose(1, 2), out=out_TNV.transpose(0, 1))
        return out_TNV
