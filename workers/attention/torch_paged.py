"""Batched attention over pages in plain torch, on the CPU and on CUDA.

Decode rows are gathered by whole page rows into a kept workspace, several sequences at a time, and attended in one call; on the CPU the
workspace is small enough to stay in the cache, so pages travel from memory once. Other rows are few and long and go one by one.

T tokens of the step, R decode rows of one gather, B blocks, S tokens of the gathered sequences, Q queries of a row, N query heads,
K key-value heads as read, G = N / K, D head dimensions, C latent, P = latent + rope dimensions, V value dimensions
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from workers.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from workers.kv.pool import PagePool

WORKSPACE_BYTES = {"cpu": 2 << 20, "cuda": 512 << 20}


class _Gather(NamedTuple):
    """Pages of decode rows [start, stop) that their windows reach into, padded to the longest of them."""

    start: int
    stop: int
    num_tokens: int  # S
    rows: torch.Tensor  # row numbers in the pool of layer 0, flat
    mask: torch.Tensor  # [R, 1, 1, S]: 0 where a token in sight is, -inf elsewhere


class TorchPagedAttention(AttentionBackend):
    """Row numbers are those of layer 0; another layer's are a constant further, so a layer is addressed by shifting the pool's view.

    Where groups of queries are unequal, key-value heads are read once per equal part of a group, so that the rest sees equal groups.
    """

    has_window = True
    has_unequal_groups = True

    def __init__(self, shape: AttentionShape, pool: PagePool) -> None:
        super().__init__(shape, pool)
        page_shape = pool.layout.page_shape
        self._is_mla = shape.latent_dim > 0
        self._block_size, self._width = page_shape[-2:]
        self._num_layers = page_shape[0] if self._is_mla else page_shape[1]
        self._token_rows = pool.tensor.view(-1, self._width)
        self._page_rows = pool.tensor.view(-1, self._block_size * self._width)
        self._workspace = pool.tensor.new_empty(0)
        self._read_heads = torch.tensor(_heads_to_read(shape), device=pool.tensor.device)
        self._num_read_heads = len(self._read_heads)
        self._token_bytes = self._width * pool.tensor.element_size() * (1 if self._is_mla else 2 * self._num_read_heads)
        self._max_bytes = WORKSPACE_BYTES[pool.tensor.device.type]

    def begin(self, batch: AttentionBatch) -> None:
        self.batch = batch
        self._write_rows = self._token_row_numbers(batch)
        self._gathers = list(self._plan_gathers(batch))

    # Where things lie. GQA pool: [page, K, layer, 2, block, D]; MLA pool: [page, layer, block, P].

    def _token_row_numbers(self, batch: AttentionBatch) -> torch.Tensor:
        stride = self._num_layers * self._block_size
        if self._is_mla:
            return batch.pages * stride + batch.offsets
        heads_K = torch.arange(self.shape.num_kv_heads, device=batch.pages.device)
        keys_TK = (batch.pages[:, None] * self.shape.num_kv_heads + heads_K) * (2 * stride) + batch.offsets[:, None]
        return torch.cat((keys_TK, keys_TK + self._block_size), dim=1).flatten()

    def _page_row_numbers(self, block_table_RB: torch.Tensor) -> torch.Tensor:
        """Flat, in the order [2, R, K, B] for GQA and [R, B] for MLA, so that what is gathered needs no permutation."""
        if self._is_mla:
            return (block_table_RB * self._num_layers).flatten()
        keys_RKB = (block_table_RB[:, None, :] * self.shape.num_kv_heads + self._read_heads[:, None]) * (2 * self._num_layers)
        return torch.stack((keys_RKB, keys_RKB + 1)).flatten()

    def _plan_gathers(self, batch: AttentionBatch) -> Iterator[_Gather]:
        """Splits the decode rows so that each gather fits the workspace (or is a single row)."""
        max_tokens = self._max_bytes // self._token_bytes
        start = 0
        while start < batch.num_decode_rows:
            stop, blocks = start, 0
            while stop < batch.num_decode_rows:
                length = batch.seq_lens[stop]
                widest = max(blocks, -(-length // self._block_size) - self._first_block(length, 1))
                if stop > start and widest * self._block_size * (stop + 1 - start) > max_tokens:
                    break
                stop, blocks = stop + 1, widest
            yield self._plan_gather(batch, start, stop, blocks)
            start = stop

    def _first_block(self, length: int, num_queries: int) -> int:
        """The first block of a row that its window, or that of the earliest of its queries, reaches into."""
        return 0 if self.shape.window is None else max(0, length - num_queries + 1 - self.shape.window) // self._block_size

    def _plan_gather(self, batch: AttentionBatch, start: int, stop: int, blocks: int) -> _Gather:
        num_tokens = blocks * self._block_size
        lengths_R1 = batch.device_seq_lens[start:stop, None]
        positions_S = torch.arange(num_tokens, device=lengths_R1.device)
        if self.shape.window is None:
            table_RB, hidden_RS = batch.block_table[start:stop, :blocks], positions_S >= lengths_R1
        else:
            first_R1 = (lengths_R1 - self.shape.window).clamp_(min=0) // self._block_size
            blocks_RB = first_R1 + torch.arange(blocks, device=lengths_R1.device)
            table_RB = batch.block_table[start:stop].gather(1, blocks_RB.clamp_(max=batch.block_table.shape[1] - 1))
            positions_RS = positions_S + first_R1 * self._block_size
            hidden_RS = (positions_RS >= lengths_R1) | (positions_RS < lengths_R1 - self.shape.window)
        mask_RS = torch.zeros(hidden_RS.shape, dtype=self.pool.tensor.dtype, device=hidden_RS.device).masked_fill_(hidden_RS, float("-inf"))
        return _Gather(start, stop, num_tokens, self._page_row_numbers(table_RB), mask_RS[:, None, None, :])

    def _gather(self, rows: torch.Tensor, first_row: int) -> torch.Tensor:
        """Page rows, copied into the workspace, flat."""
        size = len(rows) * self._page_rows.shape[1]
        if self._workspace.numel() < size:
            self._workspace = self._page_rows.new_empty(size)
        out = self._workspace[:size]
        torch.index_select(self._page_rows[first_row:], 0, rows, out=out.view(len(rows), -1))
        return out

    # Grouped-query attention

    def write_gqa(self, layer: int, kv_TKD: torch.Tensor) -> None:
        rows = self._token_rows[2 * layer * self._block_size :]
        rows.index_copy_(0, self._write_rows, kv_TKD.reshape(-1, self._width))

    def gqa(self, layer: int, q_TND: torch.Tensor) -> torch.Tensor:
        out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
        num_kv_heads = self._num_read_heads
        for gather in self._gathers:
            size = gather.stop - gather.start
            kv = self._gather(gather.rows, 2 * layer).view(2, size, num_kv_heads, gather.num_tokens, self._width)
            q_RKGD = q_TND[gather.start : gather.stop].unflatten(1, (num_kv_heads, -1))
            mask = gather.mask.expand(-1, -1, q_RKGD.shape[2], -1)
            out = F.scaled_dot_product_attention(q_RKGD, kv[0], kv[1], attn_mask=mask, scale=self.shape.scale)
            out_TND[gather.start : gather.stop] = out.flatten(1, 2)
        for row in range(self.batch.num_decode_rows, self.batch.num_rows):
            tokens = slice(self.batch.query_starts[row], self.batch.query_starts[row + 1])
            out_TND[tokens] = self._gqa_row(layer, q_TND[tokens], row)
        return out_TND

    def _gqa_row(self, layer: int, q_QND: torch.Tensor, row: int) -> torch.Tensor:
        length, num_queries, window = self.batch.seq_lens[row], len(q_QND), self.shape.window
        first, blocks = self._first_block(length, num_queries), -(-length // self._block_size)
        start = first * self._block_size
        rows = self._page_row_numbers(self.batch.block_table[row : row + 1, first:blocks])
        kv = self._gather(rows, 2 * layer).view(2, self._num_read_heads, 1, -1, self._width)[:, :, :, : length - start]
        q_KGQD = q_QND.unflatten(1, (self._num_read_heads, -1)).permute(1, 2, 0, 3)
        keys, values = kv.expand(-1, -1, q_KGQD.shape[1], -1, -1)
        is_plain = num_queries == length and (window is None or length <= window)
        mask = None if is_plain else _visible(num_queries, start, length - start, length, q_QND.device, window)
        out = F.scaled_dot_product_attention(q_KGQD, keys, values, mask, is_causal=mask is None, scale=self.shape.scale)
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    # Latent attention

    def write_mla(self, layer: int, latent_TP: torch.Tensor) -> None:
        self._token_rows[layer * self._block_size :].index_copy_(0, self._write_rows, latent_TP)

    def mla_absorbed(self, layer: int, q_TNC: torch.Tensor, rope_TNR: torch.Tensor, rows: range) -> torch.Tensor:
        q_TNP = torch.cat((q_TNC, rope_TNR), dim=-1)
        out_TNC = q_TNP.new_empty((*q_TNP.shape[:2], self.shape.latent_dim))
        base = self.batch.query_starts[rows.start]
        if rows.start < self.batch.num_decode_rows:
            assert rows.start == 0
            assert rows.stop >= self.batch.num_decode_rows
        for gather in self._gathers if rows.start < self.batch.num_decode_rows else ():
            latent_RSP = self._gather(gather.rows, layer).view(gather.stop - gather.start, gather.num_tokens, self._width)
            scores_RNS = torch.matmul(q_TNP[gather.start : gather.stop] * self.shape.scale, latent_RSP.transpose(1, 2))
            weights_RNS = torch.softmax(scores_RNS.add_(gather.mask[:, 0]), dim=-1, dtype=torch.float32).to(q_TNP.dtype)
            out_TNC[gather.start : gather.stop] = torch.matmul(weights_RNS, latent_RSP[..., : self.shape.latent_dim])
        for row in range(max(rows.start, self.batch.num_decode_rows), rows.stop):
            tokens = slice(self.batch.query_starts[row] - base, self.batch.query_starts[row + 1] - base)
            q_NQP = q_TNP[tokens].transpose(0, 1)
            merged = _OnlineSoftmax(q_NQP * self.shape.scale, self.shape.latent_dim)
            for start, latent_SP in self._latent_chunks(layer, row, self.shape.num_heads * q_NQP.shape[1] * 8):
                merged.add(latent_SP.T, latent_SP[:, : self.shape.latent_dim], start, self.batch.seq_lens[row])
            out_TNC[tokens] = merged.output().transpose(0, 1)
        return out_TNC

    def mla_plain(self, layer: int, q_TND: torch.Tensor, up_OC: torch.Tensor, value_dim: int, rows: range) -> torch.Tensor:
        out_TNV = q_TND.new_empty((*q_TND.shape[:2], value_dim))
        base = self.batch.query_starts[rows.start]
        nope_dim = up_OC.shape[0] // self.shape.num_heads - value_dim
        for row in rows:
            tokens = slice(self.batch.query_starts[row] - base, self.batch.query_starts[row + 1] - base)
            q_NQD = q_TND[tokens].transpose(0, 1)
            merged = _OnlineSoftmax(q_NQD * self.shape.scale, value_dim)
            key_bytes = (2 * nope_dim + 2 * value_dim + self._width) * up_OC.element_size()
            for start, latent_SP in self._latent_chunks(layer, row, self.shape.num_heads * (q_NQD.shape[1] * 8 + key_bytes)):
                latent_SC, rope_SD = latent_SP.tensor_split([self.shape.latent_dim], dim=1)
                up_NSO = F.linear(latent_SC, up_OC).unflatten(1, (self.shape.num_heads, -1)).transpose(0, 1)
                rope_NSD = rope_SD.expand(self.shape.num_heads, -1, -1)
                keys_NSD = torch.cat((up_NSO[..., :nope_dim], rope_NSD), dim=-1)
                merged.add(keys_NSD.transpose(1, 2), up_NSO[..., nope_dim:], start, self.batch.seq_lens[row])
            out_TNV[tokens] = merged.output().transpose(0, 1)
        return out_TNV

    def _latent_chunks(self, layer: int, row: int, bytes_per_token: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The row's latents from its first token on, in chunks for which the caller's working memory stays bounded."""
        length = self.batch.seq_lens[row]
        blocks_per_chunk = max(1, self._max_bytes // bytes_per_token // self._block_size)
        for first in range(0, -(-length // self._block_size), blocks_per_chunk):
            rows = self._page_row_numbers(self.batch.block_table[row, first : first + blocks_per_chunk])
            start = first * self._block_size
            yield start, self._gather(rows, layer).view(-1, self._width)[: length - start]


class _OnlineSoftmax:
    """Attention over keys that come in chunks, merged exactly by log-sum-exp (arXiv 1805.02867): running maximum, sum and output in
    float32. `q` [N, Q, D] is already scaled; its queries are the last positions of the sequence."""

    def __init__(self, q: torch.Tensor, value_dim: int) -> None:
        self._q = q
        self._max = torch.full((*q.shape[:2], 1), -1e30, dtype=torch.float32, device=q.device)  # finite: a chunk may be masked entirely
        self._sum = torch.zeros_like(self._max)
        self._out = torch.zeros((*q.shape[:2], value_dim), dtype=torch.float32, device=q.device)

    def add(self, keys: torch.Tensor, values: torch.Tensor, start: int, length: int) -> None:
        """Keys [D, S] or [N, D, S] and values [S, V] or [N, S, V] of positions `start` on, in a sequence of `length`."""
        num_queries, num_keys = self._q.shape[1], keys.shape[-1]
        scores = torch.matmul(self._q, keys).float()
        if start + num_keys > length - num_queries + 1:
            visible = _visible(num_queries, start, num_keys, length, scores.device)
            scores = scores.masked_fill_(~visible, float("-inf"))
        new_max = torch.maximum(self._max, scores.amax(-1, keepdim=True))
        weights = scores.sub_(new_max).exp_()
        keep = (self._max - new_max).exp_()
        self._sum = self._sum.mul_(keep).add_(weights.sum(-1, keepdim=True))
        self._out = self._out.mul_(keep).add_(torch.matmul(weights.to(values.dtype), values))
        self._max = new_max

    def output(self) -> torch.Tensor:
        return (self._out / self._sum).to(self._q.dtype)


def _heads_to_read(shape: AttentionShape) -> list[int]:
    """Key-value heads of the page, in the order in which equal groups of query heads attend to them."""
    if shape.has_equal_groups:
        return list(range(shape.num_kv_heads))
    return [shape.kv_head(head) for head in range(0, shape.num_heads, math.gcd(shape.num_heads, shape.group_size))]


def _visible(num_queries: int, start: int, num_keys: int, length: int, device: torch.device, window: int | None = None) -> torch.Tensor:
    """[Q, S], true where the key at `start` + s is not after the query and within its window, the queries being the last of `length`
    positions."""
    keys_S = torch.arange(start, start + num_keys, device=device)
    queries_Q1 = torch.arange(length - num_queries, length, device=device)[:, None]
    visible = keys_S <= queries_Q1
    return visible if window is None else visible & (keys_S > queries_Q1 - window)
