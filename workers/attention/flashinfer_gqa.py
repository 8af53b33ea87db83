"""Grouped-query attention by FlashInfer.

    decode rows      paged decode on tensor cores
    other rows       paged prefill, causal; of few queries over many keys by the kernel that splits keys (captured, it splits few keys too,
                     and merges for longer than it attends); where queries are many, keys and values are first copied together: the kernel
                     is 15-20% faster on them

N query heads, K key-value heads, D head dimensions, S keys
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from workers.attention.base import AttentionBatch
from workers.attention.flashinfer_wrappers import CapturedBuffers, Planned, Wrappers, query_starts, tables

GATHERED_BYTES = 1 << 30  # of one layer's keys and values, copied together
GATHER_QUERIES = 512  # per key, at which the copy pays
SPLIT_KEYS = 2048  # of a row, from which splitting them pays
CAPTURED_KEYS = 1024  # of a captured prompt, up to which they do not
QUERY_TILE = 128  # queries times group


class _Gathering(NamedTuple):
    """Rows whose keys and values are copied together, one row after the other."""

    pages: torch.Tensor  # int32
    starts: torch.Tensor  # int32: where the tokens of each page go, and where they end
    buffers: tuple[torch.Tensor, torch.Tensor]  # keys and values [S, K, D], written anew by each layer
    planned: Planned


class GroupedQuery:
    """Wrappers of one rank, and which of them take the rows of this step."""

    def __init__(self, wrappers: Wrappers) -> None:
        self._wrappers, self._shape = wrappers, wrappers.shape
        tensor = wrappers.pool.tensor
        self._layers = [(tensor[:, :, layer, 0], tensor[:, :, layer, 1]) for layer in range(tensor.shape[2])]  # [pages, K, block, D]
        self.few_keys = CAPTURED_KEYS if wrappers.kernel == "fa3" else 0
        self._num_processors = torch.cuda.get_device_properties(wrappers.device).multi_processor_count
        self._decode = wrappers.new_decode()
        self._prefill = wrappers.new_prefill(wrappers.kernel)
        self._short = wrappers.new_prefill("fa2")
        self._extending: Planned | None = None  # of this step: `_prefill` or `_short`
        self._gathering: _Gathering | None = None  # of this step

    def first_plans(self, batch: AttentionBatch) -> list[Callable[[], None]]:
        """What plans each kernel once, for a batch of one token."""
        rows = range(1)
        return [
            partial(self._plan_decode, self._decode, batch, rows),
            partial(self._plan_prefill, self._prefill, batch, rows),
            partial(self._plan_prefill, self._short, batch, rows),
        ]

    def captured(self, buffers: CapturedBuffers, *, is_prompt: bool) -> Planned:
        if not is_prompt:
            return self._wrappers.new_decode(buffers)
        is_few = buffers.max_pages * self._wrappers.block_size <= self.few_keys
        return self._wrappers.new_prefill("fa3" if is_few else "fa2", buffers)

    def plan_captured(self, planned: Planned, batch: AttentionBatch) -> None:
        plan = self._plan_decode if batch.num_decode_rows else self._plan_prefill
        plan(planned, batch, range(batch.num_rows))

    def begin(self, batch: AttentionBatch) -> None:
        self._extending = self._gathering = None
        if batch.num_decode_rows:
            self._plan_decode(self._decode, batch, range(batch.num_decode_rows))
        if batch.num_decode_rows < batch.num_rows:
            rows = range(batch.num_decode_rows, batch.num_rows)
            if self._is_gathered(batch, rows):
                self._gathering = self._plan_gathering(batch, rows)
            else:
                self._extending = self._short if self._is_short(batch, rows) else self._prefill
                self._plan_prefill(self._extending, batch, rows)

    def run(self, layer: int, q_TND: torch.Tensor, num_decode: int) -> torch.Tensor:
        out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
        if num_decode:
            self._decode.wrapper.run(q_TND[:num_decode], self._layers[layer], out=out_TND[:num_decode])
        if self._gathering is not None:
            pages, starts, buffers, planned = self._gathering
            self._wrappers.kernels.gather_gqa(self._wrappers.pool.tensor, layer, pages, starts, *buffers)
            planned.wrapper.run(q_TND[num_decode:], *buffers, out=out_TND[num_decode:])
        elif self._extending is not None:
            self._extending.wrapper.run(q_TND[num_decode:], self._layers[layer], out=out_TND[num_decode:])
        return out_TND

    def run_captured(self, planned: Planned, layer: int, q_TND: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        return planned.wrapper.run(q_TND, self._layers[layer], out=out)

    def write(self, layer: int, batch: AttentionBatch, kv_TKD: torch.Tensor) -> None:
        keys_TKD, values_TKD = kv_TKD.chunk(2, dim=1)
        keys, values = self._layers[layer]
        keys[batch.pages, :, batch.offsets] = keys_TKD
        values[batch.pages, :, batch.offsets] = values_TKD

    def _is_short(self, batch: AttentionBatch, rows: range) -> bool:
        """Whether queries alone would leave most of the GPU idle while keys are many. Of the two kernels only fa2 also splits these."""
        group = self._shape.num_heads // self._shape.num_kv_heads
        tiles = sum(-(-batch.num_queries(row) * group // QUERY_TILE) for row in rows) * self._shape.num_kv_heads
        return 4 * tiles <= self._num_processors and max(batch.seq_lens[rows.start : rows.stop]) >= SPLIT_KEYS

    def _is_gathered(self, batch: AttentionBatch, rows: range) -> bool:
        """Whether each key is read by so many queries that copying it costs less than looking it up in its page does every time."""
        if self._wrappers.kernel != "fa3":
            return False
        num_keys, num_pairs = 0, 0.0
        for row in rows:
            length, count = batch.seq_lens[row], batch.num_queries(row)
            num_keys += length
            num_pairs += count * (length - count / 2)
        token_bytes = 2 * self._shape.num_kv_heads * self._shape.head_dim * self._wrappers.pool.tensor.element_size()
        return num_pairs >= GATHER_QUERIES * num_keys and num_keys * token_bytes <= GATHERED_BYTES

    def _plan_decode(self, planned: Planned, batch: AttentionBatch, rows: range) -> None:
        shape, wrappers = self._shape, self._wrappers
        starts, pages, lengths = tables(batch, rows)
        planned.plan(
            starts, pages, (lengths - 1) % wrappers.block_size + 1, shape.num_heads, shape.num_kv_heads, shape.head_dim,
            wrappers.block_size, q_data_type=wrappers.dtype, kv_data_type=wrappers.dtype, sm_scale=shape.scale, seq_lens=lengths,
            window_left=wrappers.window_left,
        )  # fmt: skip

    def _plan_prefill(self, planned: Planned, batch: AttentionBatch, rows: range) -> None:
        shape, wrappers = self._shape, self._wrappers
        starts, pages, lengths = tables(batch, rows)
        planned.plan(
            query_starts(batch, rows), starts, pages, (lengths - 1) % wrappers.block_size + 1, shape.num_heads, shape.num_kv_heads,
            shape.head_dim, wrappers.block_size, causal=True, sm_scale=shape.scale, q_data_type=wrappers.dtype,
            kv_data_type=wrappers.dtype, seq_lens=lengths, window_left=wrappers.window_left,
        )  # fmt: skip

    def _plan_gathering(self, batch: AttentionBatch, rows: range) -> _Gathering:
        shape, wrappers = self._shape, self._wrappers
        host_starts, pages, host_lengths = tables(batch, rows)
        starts, lengths = host_starts.numpy(), host_lengths.numpy()
        ends, counts = np.cumsum(lengths), np.diff(starts)
        first = np.repeat(ends - lengths, counts) + (np.arange(starts[-1]) - np.repeat(starts[:-1], counts)) * wrappers.block_size
        on_device = torch.from_numpy(np.append(first, ends[-1]).astype(np.int32)).pin_memory().to(pages.device, non_blocking=True)
        size = (int(ends[-1]), shape.num_kv_heads, shape.head_dim)
        keys, values = (torch.empty(size, dtype=wrappers.dtype, device=pages.device) for _ in range(2))
        (planned,) = wrappers.ragged(1)
        wrappers.plan_ragged(planned, batch, rows, lengths, shape.num_kv_heads, shape.head_dim, shape.head_dim, causal=True)
        return _Gathering(pages, on_device, (keys, values), planned)
