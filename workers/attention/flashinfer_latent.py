"""Latent attention by FlashInfer.

    decode rows and short suffixes      paged latent attention, absorbed
    other rows                          latents are projected up and attended as a ragged batch, key range by key range where they are many

Log-sum-exps are to base 2.

T tokens, N query heads, C latent, P = latent + rope, D query-key dimensions, V value dimensions, S keys
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from workers.attention.base import AttentionBatch
from workers.attention.flashinfer_wrappers import CapturedBuffers, Planned, Wrappers, query_starts, tables
from workers.errors import UnsupportedConfig

PROJECTED_BYTES = 1 << 30  # of up-projected keys and values at once
LATENT_DIMS, PROJECTED_DIMS = (512, 64), (192, 128)  # latent and rope; query-key and value of the plain form
_UP_SLACK = 128  # dimensions per head that the projection holds besides keys and values: the nope part, before it is joined to the rope


class Latent:
    """Wrappers of one rank, which are planned once the layers have said which rows they absorb."""

    few_keys = 0  # the kernel decides for each batch how to split keys

    def __init__(self, wrappers: Wrappers) -> None:
        self._wrappers, self._shape = wrappers, wrappers.shape
        tensor, latent_dim = wrappers.pool.tensor, wrappers.shape.latent_dim
        self._layers = [(tensor[:, layer, :, :latent_dim], tensor[:, layer, :, latent_dim:]) for layer in range(tensor.shape[1])]
        self._absorbed = wrappers.new_latent()
        self._planned_rows: range | None = None  # of `_absorbed`, in this step
        self._ranges: list[torch.Tensor] | None = None  # of keys, for plain rows of this step

    def first_plans(self, batch: AttentionBatch) -> list[Callable[[], object]]:
        """What plans each kernel once, for a batch of one token."""
        rows = range(1)
        return [partial(self._plan, self._absorbed, batch, rows), partial(self._plan_ranges, batch, rows, *PROJECTED_DIMS)]

    def captured(self, buffers: CapturedBuffers, *, is_prompt: bool) -> Planned:
        return self._wrappers.new_latent(buffers)

    def plan_captured(self, planned: Planned, batch: AttentionBatch) -> None:
        self._plan(planned, batch, range(batch.num_rows))

    def begin(self, batch: AttentionBatch) -> None:
        self._planned_rows = self._ranges = None

    def absorbed(self, layer: int, batch: AttentionBatch, q_TNC: torch.Tensor, rope_TNR: torch.Tensor, rows: range) -> torch.Tensor:
        if self._planned_rows != rows:
            self._plan(self._absorbed, batch, rows)
            self._planned_rows = rows
        return self._absorbed.wrapper.run(q_TNC, rope_TNR, *self._layers[layer])

    def run_captured(
        self, planned: Planned, layer: int, q_TNC: torch.Tensor, rope_TNR: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        return planned.wrapper.run(q_TNC, rope_TNR, *self._layers[layer], out=out)

    def plain(
        self, layer: int, batch: AttentionBatch, q_TND: torch.Tensor, up_OC: torch.Tensor, value_dim: int, rows: range
    ) -> torch.Tensor:
        if (q_TND.shape[2], value_dim) != PROJECTED_DIMS:
            raise UnsupportedConfig(
                f"flashinfer's ragged latent attention has kernels for {PROJECTED_DIMS}, not {q_TND.shape[2], value_dim}"
            )
        if self._ranges is None:
            self._ranges = self._plan_ranges(batch, rows, q_TND.shape[2], value_dim)
        merged: tuple[torch.Tensor, torch.Tensor] | None = None
        for planned, token_rows in zip(self._wrappers.ragged(len(self._ranges)), self._ranges, strict=True):
            keys_SND, values_SNV = self._project(layer, token_rows, up_OC, value_dim)
            if len(self._ranges) == 1:
                return planned.wrapper.run(q_TND, keys_SND, values_SNV)
            part = planned.wrapper.run(q_TND, keys_SND, values_SNV, return_lse=True)
            merged = part if merged is None else _merge(*merged, *part)
        assert merged
        return merged[0]

    def _plan(self, planned: Planned, batch: AttentionBatch, rows: range) -> None:
        shape, wrappers = self._shape, self._wrappers
        starts, pages, lengths = tables(batch, rows)
        planned.plan(
            query_starts(batch, rows), starts, pages, lengths, shape.num_heads, *LATENT_DIMS, wrappers.block_size, True, shape.scale,
            wrappers.dtype, wrappers.dtype,
        )  # fmt: skip

    def _project(self, layer: int, token_rows: torch.Tensor, up_OC: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [S, N, D] and values [S, N, V] of tokens that lie at `token_rows` of layer 0."""
        tensor, wrappers = self._wrappers.pool.tensor, self._wrappers
        width, latent_dim = tensor.shape[-1], self._shape.latent_dim
        flat = tensor.view(-1, width)[layer * wrappers.block_size :]
        latent_SC, rope_SR = flat[token_rows].split([latent_dim, width - latent_dim], dim=1)
        up_SNO = F.linear(latent_SC, up_OC).unflatten(1, (self._shape.num_heads, -1))
        nope_SND, values_SNV = up_SNO.tensor_split([up_SNO.shape[2] - value_dim], dim=2)
        return wrappers.kernels.join_keys(nope_SND, rope_SR), values_SNV

    def _plan_ranges(self, batch: AttentionBatch, rows: range, key_dim: int, value_dim: int) -> list[torch.Tensor]:
        """Plans a ragged wrapper for each range of keys; returns where the range's tokens lie.

        One range if everything fits: causal. Else the step's own tokens, causal, then what was there before in bounded pieces.
        """
        wrappers = self._wrappers
        lengths = [batch.seq_lens[row] for row in rows]
        own = [batch.num_queries(row) for row in rows]
        token_bytes = self._shape.num_heads * (key_dim + value_dim + _UP_SLACK) * wrappers.pool.tensor.element_size()
        max_tokens = max(wrappers.block_size, PROJECTED_BYTES // token_bytes)
        if sum(lengths) <= max_tokens:
            ranges = [([0] * len(lengths), lengths)]
        else:
            before = [length - count for length, count in zip(lengths, own, strict=True)]
            ranges = [(before, lengths)]
            step = max(wrappers.block_size, max_tokens // len(lengths))
            for start in range(0, max(before), step):
                ranges.append(([min(start, stop) for stop in before], [min(start + step, stop) for stop in before]))
        places = []
        for number, (planned, (starts, stops)) in enumerate(zip(wrappers.ragged(len(ranges)), ranges, strict=True)):
            num_keys = np.subtract(stops, starts)
            wrappers.plan_ragged(planned, batch, rows, num_keys, self._shape.num_heads, key_dim, value_dim, causal=number == 0)
            places.append(self._token_rows(batch, rows, starts, stops))
        return places

    def _token_rows(self, batch: AttentionBatch, rows: range, starts: list[int], stops: list[int]) -> torch.Tensor:
        """Rows of the pool, seen as [pages * layers * block, P], that hold positions [start, stop) of each row in layer 0; int64."""
        block_size, pieces = self._wrappers.block_size, []
        assert batch.kv_starts is not None
        assert batch.kv_pages is not None
        stride = self._wrappers.pool.tensor.shape[1] * block_size
        for row, start, stop in zip(rows, starts, stops, strict=True):
            first = batch.kv_starts[row]
            pages = batch.kv_pages[first + start // block_size : first + -(-stop // block_size)].long()
            within = torch.arange(block_size, device=pages.device)
            skipped = start - start % block_size
            pieces.append((pages[:, None] * stride + within).flatten()[start - skipped : stop - skipped])
        return torch.cat(pieces)


def _merge(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two ranges of keys as one: outputs [T, N, V], log-sum-exps [T, N] of base 2, -inf for an empty range."""
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == float("-inf"), 0.0, top)
    weight_a, weight_b = torch.exp2(lse_a - top), torch.exp2(lse_b - top)
    total = weight_a + weight_b
    out = (out_a * weight_a[..., None] + out_b.nan_to_num(0.0) * weight_b[..., None]) / total[..., None]
    return out.to(out_a.dtype), total.log2() + top
