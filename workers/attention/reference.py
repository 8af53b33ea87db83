"""One sequence at a time, in float32, with nothing clever: what every other backend is compared with.

T tokens of the step, Q queries of a row, S its sequence length, N query heads, K key-value heads, D head dimensions, C latent,
P = latent + rope dimensions
"""

from __future__ import annotations

import torch

from workers.attention.base import AttentionBackend, AttentionBatch


class ReferenceAttention(AttentionBackend):
    """The oracle. Pools are read and written through their plain shapes."""

    has_window = True
    has_unequal_groups = True

    def begin(self, batch: AttentionBatch) -> None:
        self.batch = batch

    def write_gqa(self, layer: int, kv_TKD: torch.Tensor) -> None:
        keys, values = kv_TKD.chunk(2, dim=1)
        for token, (page, offset) in enumerate(zip(self.batch.pages.tolist(), self.batch.offsets.tolist(), strict=True)):
            self.pool.tensor[page, :, layer, 0, offset] = keys[token]
            self.pool.tensor[page, :, layer, 1, offset] = values[token]

    def gqa(self, layer: int, q_TND: torch.Tensor) -> torch.Tensor:
        out_TND = torch.empty_like(q_TND)
        for row in range(self.batch.num_rows):
            first, last = self.batch.query_starts[row], self.batch.query_starts[row + 1]
            pages = self.pool.tensor[self.batch.block_table[row], :, layer]  # [B, K, 2, block, D]
            keys, values = pages.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, : self.batch.seq_lens[row]]  # [K, S, D] each
            for head in range(self.shape.num_heads):
                kv_head = self.shape.kv_head(head)
                out_TND[first:last, head] = self._attend(q_TND[first:last, head], keys[kv_head], values[kv_head], row)
        return out_TND

    def write_mla(self, layer: int, latent_TP: torch.Tensor) -> None:
        for token, (page, offset) in enumerate(zip(self.batch.pages.tolist(), self.batch.offsets.tolist(), strict=True)):
            self.pool.tensor[page, layer, offset] = latent_TP[token]

    def _latents(self, layer: int, row: int) -> torch.Tensor:
        return self.pool.tensor[self.batch.block_table[row], layer].flatten(0, 1)[: self.batch.seq_lens[row]]

    def mla_absorbed(self, layer: int, q_TNC: torch.Tensor, rope_TNR: torch.Tensor, rows: range) -> torch.Tensor:
        q_TNP = torch.cat((q_TNC, rope_TNR), dim=-1)
        out_TNC = q_TNP.new_empty((*q_TNP.shape[:2], self.shape.latent_dim))
        base = self.batch.query_starts[rows.start]
        for row in rows:
            first, last = self.batch.query_starts[row] - base, self.batch.query_starts[row + 1] - base
            latent_SP = self._latents(layer, row)
            for head in range(self.shape.num_heads):
                values_SC = latent_SP[:, : self.shape.latent_dim]
                out_TNC[first:last, head] = self._attend(q_TNP[first:last, head], latent_SP, values_SC, row)
        return out_TNC

    def mla_plain(self, layer: int, q_TND: torch.Tensor, up_OC: torch.Tensor, value_dim: int, rows: range) -> torch.Tensor:
        out_TNV = q_TND.new_empty((*q_TND.shape[:2], value_dim))
        base = self.batch.query_starts[rows.start]
        up = up_OC.float().view(self.shape.num_heads, -1, self.shape.latent_dim)
        for row in rows:
            first, last = self.batch.query_starts[row] - base, self.batch.query_starts[row + 1] - base
            latent_SC, rope_SD = self._latents(layer, row).float().tensor_split([self.shape.latent_dim], dim=1)
            for head in range(self.shape.num_heads):
                nope_SD, value_SV = (latent_SC @ up[head].T).split([up.shape[1] - value_dim, value_dim], dim=1)
                key_SD = torch.cat((nope_SD, rope_SD), dim=1)
                out_TNV[first:last, head] = self._attend(q_TND[first:last, head], key_SD, value_SV, row)
        return out_TNV

    def _attend(self, q_QD: torch.Tensor, key_SD: torch.Tensor, value_SD: torch.Tensor, row: int) -> torch.Tensor:
        num_queries, length = len(q_QD), self.batch.seq_lens[row]
        scores_QS = q_QD.float() @ key_SD.float().T * self.shape.scale
        for query in range(num_queries):
            position = length - num_queries + query
            scores_QS[query, position + 1 :] = float("-inf")
            if self.shape.window is not None:
                scores_QS[query, : max(0, position + 1 - self.shape.window)] = float("-inf")
        return (torch.softmax(scores_QS, dim=1) @ value_SD.float()).to(q_QD.dtype)
