"""Attention by FlashInfer's kernels over strided per-layer views of the pool. Bfloat16 and float16 on CUDA.

`flashinfer_gqa` and `flashinfer_latent` say which kernel takes which rows. Captured batches have a wrapper each, whose addresses stay.

T tokens, N query heads, K key-value heads, D head dimensions, C latent
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from workers.attention.base import AttentionBackend, AttentionBatch, AttentionShape, Progress, Rope
from workers.attention.flashinfer_gqa import GroupedQuery
from workers.attention.flashinfer_latent import LATENT_DIMS, Latent
from workers.attention.flashinfer_wrappers import CapturedBuffers, Planned, Wrappers
from workers.errors import UnsupportedConfig
from workers.kv.pool import PagePool

_HEAD_DIMS = (64, 128, 256)


class FlashInferAttention(AttentionBackend):
    """UnsupportedConfig where FlashInfer is missing or has no kernel for the shape."""

    has_window = True
    has_graphs = True
    reads_behind_end = False
    reads_block_table = False

    def __init__(self, shape: AttentionShape, pool: PagePool) -> None:
        super().__init__(shape, pool)
        self._check()
        wrappers = Wrappers(shape, pool)
        self._kernels = wrappers.kernels
        self._gqa = None if shape.latent_dim else GroupedQuery(wrappers)
        self._latent = Latent(wrappers) if shape.latent_dim else None
        self.few_keys = self._form.few_keys
        self._graphs: dict[tuple[int, int, int], Planned] = {}  # by captured rows, tokens and pages
        self._captured_out: torch.Tensor | None = None  # [T, N, D or C] of captured prompts: behind the last query stays what was there
        self._active: Planned | None = None  # the captured one of this step; None: eager

    def _check(self) -> None:
        shape, tensor = self.shape, self.pool.tensor
        if not tensor.is_cuda or tensor.dtype not in (torch.bfloat16, torch.float16):
            raise UnsupportedConfig(f"flashinfer runs bfloat16 and float16 on CUDA, not {tensor.dtype} on {tensor.device.type}")
        if shape.latent_dim:
            dims = (shape.latent_dim, tensor.shape[-1] - shape.latent_dim)
            if dims != LATENT_DIMS:
                raise UnsupportedConfig(f"flashinfer's latent attention has kernels for {LATENT_DIMS} dimensions, not {dims}")
        elif shape.head_dim not in _HEAD_DIMS:
            raise UnsupportedConfig(f"flashinfer has kernels for head dimensions {_HEAD_DIMS}, not {shape.head_dim}")
        try:
            importlib.import_module("flashinfer")
        except ImportError as error:
            raise UnsupportedConfig(f"flashinfer is not installed (pip install 'mobula[gpu]'): {error}") from error

    @property
    def _form(self) -> GroupedQuery | Latent:
        form = self._gqa or self._latent
        assert form
        return form

    def build(self, progress: Progress) -> None:
        """Has FlashInfer build, side by side, the kernels that it lacks: minutes the first time, nothing once they are in its cache.

        A wrapper builds its kernel when it is first planned, so each is planned for one token on the null page.
        """
        device = self.pool.tensor.device
        self.batch = AttentionBatch(
            num_decode_rows=1,
            query_starts=[0, 1],
            seq_lens=[1],
            device_seq_lens=torch.ones(1, dtype=torch.int64, device=device),
            block_table=torch.zeros((1, 1), dtype=torch.int64, device=device),
            pages=torch.zeros(1, dtype=torch.int64, device=device),
            offsets=torch.zeros(1, dtype=torch.int64, device=device),
            kv_pages=torch.zeros(1, dtype=torch.int32, device=device),
            kv_starts=np.array([0, 1], np.int32),
        )
        plans = self._form.first_plans(self.batch)
        progress("kernels", 0, len(plans))
        with ThreadPoolExecutor(len(plans), initializer=torch.cuda.set_device, initargs=(device,)) as executor:
            for number, built in enumerate([executor.submit(plan) for plan in plans], start=1):
                built.result()
                progress("kernels", number, len(plans))

    def begin(self, batch: AttentionBatch) -> None:
        self.batch = batch
        self._active = None
        self._form.begin(batch)

    def reserve_graph(self, num_rows: int, num_tokens: int, max_pages: int) -> None:
        """A wrapper of its own, whose addresses stay."""
        device, is_prompt = self.pool.tensor.device, num_tokens > num_rows
        buffers = CapturedBuffers(num_rows, max_pages, device)
        self._graphs[num_rows, num_tokens, max_pages] = self._form.captured(buffers, is_prompt=is_prompt)
        if is_prompt and (self._captured_out is None or len(self._captured_out) < num_tokens):
            shape = (num_tokens, self.shape.num_heads, self.shape.latent_dim or self.shape.head_dim)
            self._captured_out = torch.zeros(shape, dtype=self.pool.tensor.dtype, device=device)

    def begin_graph(self, batch: AttentionBatch) -> None:
        """`begin` for a batch that runs as a captured graph, of as many rows, tokens and pages as were reserved."""
        self.batch = batch
        self._active = self._graphs[batch.num_rows, len(batch.pages), batch.captured_pages]
        self._form.plan_captured(self._active, batch)

    def _out_of(self, queries: torch.Tensor) -> torch.Tensor | None:
        """Where a captured batch puts its attention: padding must stay finite."""
        return None if self.batch.num_decode_rows or self._captured_out is None else self._captured_out[: len(queries)]

    # Grouped-query attention

    def rotate_and_write_gqa(
        self, layer: int, qkv_TMD: torch.Tensor, rope: Rope, norms: tuple[torch.Tensor, torch.Tensor, float] | None
    ) -> None:
        batch = self.batch
        self._kernels.rotate_and_write_gqa(qkv_TMD, self.shape.num_heads, rope, norms, self.pool.tensor, layer, batch.pages, batch.offsets)

    def write_gqa(self, layer: int, kv_TKD: torch.Tensor) -> None:
        assert self._gqa
        self._gqa.write(layer, self.batch, kv_TKD)

    def gqa(self, layer: int, q_TND: torch.Tensor) -> torch.Tensor:
        assert self._gqa
        if self._active is not None:
            return self._gqa.run_captured(self._active, layer, q_TND, self._out_of(q_TND))
        return self._gqa.run(layer, q_TND, self.batch.num_decode_rows)

    # Latent attention

    def rotate_and_write_mla(
        self, layer: int, q_TND: torch.Tensor, latent_TP: torch.Tensor, rope: Rope, norm: tuple[torch.Tensor, float], interleaved: bool
    ) -> None:
        batch, nope_dim = self.batch, q_TND.shape[2] - LATENT_DIMS[1]
        write = self._kernels.rotate_and_write_mla
        write(q_TND, latent_TP, nope_dim, rope, norm, interleaved, self.pool.tensor, layer, batch.pages, batch.offsets)

    def write_mla(self, layer: int, latent_TP: torch.Tensor) -> None:
        self.pool.tensor[self.batch.pages, layer, self.batch.offsets] = latent_TP

    def mla_absorbed(self, layer: int, q_TNC: torch.Tensor, rope_TNR: torch.Tensor, rows: range) -> torch.Tensor:
        assert self._latent
        if self._active is not None:
            return self._latent.run_captured(self._active, layer, q_TNC, rope_TNR, self._out_of(q_TNC))
        return self._latent.absorbed(layer, self.batch, q_TNC, rope_TNR, rows)

    def mla_plain(self, layer: int, q_TND: torch.Tensor, up_OC: torch.Tensor, value_dim: int, rows: range) -> torch.Tensor:
        assert self._latent
        return self._latent.plain(layer, self.batch, q_TND, up_OC, value_dim, rows)
