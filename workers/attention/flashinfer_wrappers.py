"""FlashInfer's wrappers: how they are made and planned for one rank's shape and pool.

A wrapper is planned once per step, on the host, and run once per layer. `plan` stages its numbers in pinned memory that the device reads
later, so each wrapper has two of these in turn: with two steps launched, the one before last is done.

R rows
"""

from __future__ import annotations

import builtins
import importlib
import sys
from typing import Any

import numpy as np
import torch

from workers.attention.base import AttentionBatch, AttentionShape
from workers.kv.pool import PagePool

WORKSPACE_BYTES = 256 << 20
PLANNING_MODULES = ("flashinfer.decode", "flashinfer.prefill")


def largest(*values: Any, **options: Any) -> Any:
    """Python's `max`, which would compare the elements of a tensor as tensors: 0.4 ms for 256 lengths, in each step. FlashInfer's `plan`
    finds the longest row with it."""
    is_tensor = len(values) == 1 and isinstance(values[0], torch.Tensor)
    return values[0].max() if is_tensor else builtins.max(*values, **options)


class Planned:
    """One wrapper, whose pinned staging memory alternates. Takes a step's lengths from the host."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        first = wrapper._pin_memory_int_workspace_buffer
        self._staging = [first, torch.empty_like(first).pin_memory()]

    def plan(self, *arguments: Any, **options: Any) -> None:
        self._staging.reverse()
        self.wrapper._pin_memory_int_workspace_buffer = self._staging[0]
        self.wrapper.plan(*arguments, **options)


class CapturedBuffers:
    """Where a captured wrapper keeps what its graph reads; int32 on the device."""

    def __init__(self, num_rows: int, max_pages: int, device: torch.device) -> None:
        self.max_pages = max_pages
        counts = (num_rows + 1, num_rows + 1, num_rows, max_pages)
        self.query_starts, self.starts, self.lengths, self.pages = (
            torch.zeros(count, dtype=torch.int32, device=device) for count in counts
        )


class Wrappers:
    """All share one workspace, since only one runs at a time."""

    def __init__(self, shape: AttentionShape, pool: PagePool) -> None:
        self.shape, self.pool = shape, pool
        self.block_size = pool.layout.block_size
        self.dtype, self.device = pool.tensor.dtype, pool.tensor.device
        self.window_left = -1 if shape.window is None else shape.window - 1
        self.kernel = "fa3" if torch.cuda.get_device_capability(self.device)[0] == 9 else "fa2"
        self.kernels = importlib.import_module("workers.kernels.pages")  # needs Triton
        self._flashinfer = importlib.import_module("flashinfer")
        for name in PLANNING_MODULES:
            if module := sys.modules.get(name):
                module.max = largest  # type: ignore[attr-defined]
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self._ragged: list[Planned] = []

    def new_decode(self, buffers: CapturedBuffers | None = None) -> Planned:
        return Planned(
            self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "HND",
                use_tensor_cores=True,
                use_cuda_graph=buffers is not None,
                paged_kv_indptr_buffer=buffers and buffers.starts,
                paged_kv_indices_buffer=buffers and buffers.pages,
                paged_kv_last_page_len_buffer=buffers and buffers.lengths,
            )
        )

    def new_prefill(self, kernel: str, buffers: CapturedBuffers | None = None) -> Planned:
        return Planned(
            self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace,
                "HND",
                use_cuda_graph=buffers is not None,
                qo_indptr_buf=buffers and buffers.query_starts,
                paged_kv_indptr_buf=buffers and buffers.starts,
                paged_kv_indices_buf=buffers and buffers.pages,
                paged_kv_last_page_len_buf=buffers and buffers.lengths,
                backend=kernel,
            )
        )

    def new_latent(self, buffers: CapturedBuffers | None = None) -> Planned:
        return Planned(
            self._flashinfer.mla.BatchMLAPagedAttentionWrapper(
                self._workspace,
                use_cuda_graph=buffers is not None,
                qo_indptr=buffers and buffers.query_starts,
                kv_indptr=buffers and buffers.starts,
                kv_indices=buffers and buffers.pages,
                kv_len_arr=buffers and buffers.lengths,
                backend=self.kernel,
            )
        )

    def ragged(self, count: int) -> list[Planned]:
        """The first `count` of those over keys that lie one behind the other."""
        while len(self._ragged) < count:
            wrapper = self._flashinfer.BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD", backend=self.kernel)
            self._ragged.append(Planned(wrapper))
        return self._ragged[:count]

    def plan_ragged(
        self,
        planned: Planned,
        batch: AttentionBatch,
        rows: range,
        num_keys: np.ndarray,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        causal: bool,
    ) -> None:
        """`num_keys` of each row."""
        planned.plan(
            query_starts(batch, rows), torch.from_numpy(np.concatenate(([0], np.cumsum(num_keys))).astype(np.int32)),
            self.shape.num_heads, num_kv_heads, key_dim, value_dim, causal=causal, sm_scale=self.shape.scale, q_data_type=self.dtype,
            kv_data_type=self.dtype, window_left=self.window_left,
        )  # fmt: skip


def tables(batch: AttentionBatch, rows: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of some rows: where their pages begin (host), their pages (device), and their lengths (host); int32."""
    assert batch.kv_starts is not None
    assert batch.kv_pages is not None
    starts = batch.kv_starts[rows.start : rows.stop + 1]
    lengths = np.asarray(batch.seq_lens[rows.start : rows.stop], np.int32)
    return torch.from_numpy(starts - starts[0]), batch.kv_pages[starts[0] : starts[-1]], torch.from_numpy(lengths)


def query_starts(batch: AttentionBatch, rows: range) -> torch.Tensor:
    """Where the tokens of some rows begin, from the first row's on (host, int32)."""
    starts = np.asarray(batch.query_starts[rows.start : rows.stop + 1], np.int32)
    return torch.from_numpy(starts - starts[0])
