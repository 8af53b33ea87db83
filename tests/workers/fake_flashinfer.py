"""FlashInfer's wrappers as far as the backend uses them, in plain torch on the CPU, with the checks that the library and its kernels make
or rely on: what is planned lies on the host as int32, pages exist, and a captured wrapper outgrows nothing it was first planned with."""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

import torch

planned_in: list[str] = []  # names of wrappers, in the order of their plans


def attend(
    q_QND: torch.Tensor, k_SKD: torch.Tensor, v_SKV: torch.Tensor, *, causal: bool, scale: float, window_left: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [Q, N, V] and log-sum-exps [Q, N] of base 2; queries stand at the end of the keys."""
    num_queries, num_keys = len(q_QND), len(k_SKD)
    group = q_QND.shape[1] // k_SKD.shape[1]
    k_SND, v_SNV = (each.float().repeat_interleave(group, 1) for each in (k_SKD, v_SKV))
    scores_NQS = torch.einsum("qnd,snd->nqs", q_QND.float(), k_SND) * scale
    position, key = torch.arange(num_queries)[:, None] + num_keys - num_queries, torch.arange(num_keys)[None, :]
    hidden = (key > position) if causal else torch.zeros(num_queries, num_keys, dtype=torch.bool)
    if window_left >= 0:
        hidden |= key < position - window_left
    scores_NQS = scores_NQS.masked_fill(hidden, float("-inf"))
    lse_QN = torch.logsumexp(scores_NQS, 2).T / torch.log(torch.tensor(2.0))
    out_QNV = torch.einsum("nqs,snv->qnv", torch.softmax(scores_NQS, 2), v_SNV)
    return out_QNV.to(q_QND.dtype), lse_QN


def check_host(*arrays: torch.Tensor) -> None:
    for array in arrays:
        assert array.device.type == "cpu"
        assert array.dtype is torch.int32


def check_starts(starts: torch.Tensor) -> None:
    assert starts[0] == 0
    assert (starts.diff() >= 0).all()


class Wrapper:
    """What all have in common: pinned memory that the backend swaps, and rows of queries."""

    def __init__(self, name: str, *, is_captured: bool) -> None:
        self._pin_memory_int_workspace_buffer = torch.zeros(16, dtype=torch.uint8)
        self._name, self._is_captured = name, is_captured
        self._max_rows: int | None = None

    def _plan_queries(self, query_starts: torch.Tensor, max_pages: torch.Tensor | None, pages: torch.Tensor | None) -> None:
        planned_in.append(self._name)
        check_host(query_starts)
        check_starts(query_starts)
        self._query_starts = query_starts.tolist()
        if self._is_captured:
            self._max_rows = self._max_rows or self._query_starts[-1]
            assert self._query_starts[-1] <= self._max_rows
            assert max_pages is not None
            assert pages is not None
            assert len(pages) <= len(max_pages)

    def _queries(self, q_TND: torch.Tensor) -> list[torch.Tensor]:
        """By row. A captured graph runs on padding too, and looks at none of it."""
        assert len(q_TND) == (self._max_rows if self._is_captured else self._query_starts[-1])
        return [q_TND[start:stop] for start, stop in itertools.pairwise(self._query_starts)]

    def _write(self, q_TND: torch.Tensor, parts: list[torch.Tensor], value_dim: int, out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            out = q_TND.new_full((*q_TND.shape[:2], value_dim), float("nan"))
        assert out.shape == (*q_TND.shape[:2], value_dim)
        assert out.is_contiguous()
        out[: self._query_starts[-1]] = torch.cat(parts)
        return out


class PagedWrapper(Wrapper):
    """Keys and values [pages, K, block, D]."""

    def _plan_paged(
        self,
        query_starts: Any,
        starts: Any,
        pages: Any,
        last_lengths: Any,
        heads: tuple[int, int, int],
        block_size: int,
        options: Any,
        room: Any,
    ) -> None:
        self._plan_queries(query_starts, room, pages)
        check_host(starts, pages, last_lengths, options["seq_lens"])
        check_starts(starts)
        assert ((last_lengths >= 1) & (last_lengths <= block_size)).all()
        assert starts[-1] == len(pages)
        lengths = (starts.diff() - 1) * block_size + last_lengths
        assert torch.equal(lengths, options["seq_lens"])
        self._heads, self._scale, self._window_left = heads, options["sm_scale"], options["window_left"]
        self._rows = [
            (pages[start:stop].long(), int(length))
            for (start, stop), length in zip(itertools.pairwise(starts.tolist()), lengths, strict=True)
        ]

    def run(self, q_TND: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
        assert (q_TND.shape[1], cache[0].shape[1], q_TND.shape[2]) == self._heads
        parts = []
        for q_QND, (pages, length) in zip(self._queries(q_TND), self._rows, strict=True):
            keys, values = (each[pages].transpose(1, 2).flatten(0, 1)[:length] for each in cache)
            parts.append(attend(q_QND, keys, values, causal=True, scale=self._scale, window_left=self._window_left)[0])
        return self._write(q_TND, parts, q_TND.shape[2], out)


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(
        self, workspace: torch.Tensor, layout: str, *, use_tensor_cores: bool, use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: Any = None, paged_kv_indices_buffer: Any = None, paged_kv_last_page_len_buffer: Any = None,
    ) -> None:  # fmt: skip
        assert layout == "HND"
        assert use_tensor_cores
        super().__init__("decode", is_captured=use_cuda_graph)
        self._room = paged_kv_indices_buffer

    def plan(self, starts: Any, pages: Any, last: Any, heads: int, kv_heads: int, dim: int, block_size: int, **options: Any) -> None:
        rows = torch.arange(len(starts), dtype=torch.int32)
        self._plan_paged(rows, starts, pages, last, (heads, kv_heads, dim), block_size, options, self._room)


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(
        self, workspace: torch.Tensor, layout: str, *, use_cuda_graph: bool = False, qo_indptr_buf: Any = None,
        paged_kv_indptr_buf: Any = None, paged_kv_indices_buf: Any = None, paged_kv_last_page_len_buf: Any = None, backend: str,
    ) -> None:  # fmt: skip
        assert layout == "HND"
        super().__init__(f"paged {backend}{' captured' if use_cuda_graph else ''}", is_captured=use_cuda_graph)
        self._room = paged_kv_indices_buf

    def plan(
        self, query_starts: Any, starts: Any, pages: Any, last: Any, heads: int, kv_heads: int, dim: int, block_size: int, *, causal: bool,
        **options: Any,
    ) -> None:  # fmt: skip
        assert causal
        self._plan_paged(query_starts, starts, pages, last, (heads, kv_heads, dim), block_size, options, self._room)


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    def __init__(self, workspace: torch.Tensor, layout: str, *, backend: str) -> None:
        assert layout == "NHD"
        super().__init__("ragged", is_captured=False)

    def plan(
        self, query_starts: Any, starts: Any, heads: int, kv_heads: int, key_dim: int, value_dim: int, *, causal: bool, sm_scale: float,
        window_left: int, **_: Any,
    ) -> None:  # fmt: skip
        self._plan_queries(query_starts, None, None)
        check_host(starts)
        check_starts(starts)
        self._starts, self._causal, self._scale, self._window_left = starts.tolist(), causal, sm_scale, window_left
        self._dims = (heads, kv_heads, key_dim, value_dim)

    def run(self, q_TND: Any, k_SKD: Any, v_SKV: Any, out: Any = None, *, return_lse: bool = False) -> Any:
        assert (q_TND.shape[1], k_SKD.shape[1], k_SKD.shape[2], v_SKV.shape[2]) == self._dims
        assert len(k_SKD) == len(v_SKV) == self._starts[-1]
        found = [
            attend(q_QND, k_SKD[start:stop], v_SKV[start:stop], causal=self._causal, scale=self._scale, window_left=self._window_left)
            for q_QND, (start, stop) in zip(self._queries(q_TND), itertools.pairwise(self._starts), strict=True)
        ]
        out = self._write(q_TND, [part for part, _ in found], self._dims[3], out)
        return (out, torch.cat([lse for _, lse in found])) if return_lse else out


class BatchMLAPagedAttentionWrapper(Wrapper):
    def __init__(
        self, workspace: torch.Tensor, *, use_cuda_graph: bool = False, qo_indptr: Any = None, kv_indptr: Any = None,
        kv_indices: Any = None, kv_len_arr: Any = None, backend: str,
    ) -> None:  # fmt: skip
        super().__init__(f"latent{' captured' if use_cuda_graph else ''}", is_captured=use_cuda_graph)
        self._room = kv_indices

    def plan(
        self, query_starts: Any, starts: Any, pages: Any, lengths: Any, heads: int, latent: int, rope: int, block_size: int, causal: bool,
        scale: float, *_: Any,
    ) -> None:  # fmt: skip
        assert causal
        self._plan_queries(query_starts, self._room, pages)
        check_host(starts, pages, lengths)
        check_starts(starts)
        assert (-(-lengths // block_size) == starts.diff()).all()
        self._scale = scale
        self._rows = [
            (pages[start:stop].long(), length)
            for (start, stop), length in zip(itertools.pairwise(starts.tolist()), lengths.tolist(), strict=True)
        ]

    def run(self, q_TNC: Any, rope_TNR: Any, latents: Any, ropes: Any, out: Any = None) -> torch.Tensor:
        parts = []
        for q_QNC, q_QNR, (pages, length) in zip(self._queries(q_TNC), self._queries(rope_TNR), self._rows, strict=True):
            latent_SC, rope_SR = (each[pages].flatten(0, 1)[:length, None] for each in (latents, ropes))
            keys = torch.cat((latent_SC, rope_SR), 2)
            parts.append(attend(torch.cat((q_QNC, q_QNR), 2), keys, latent_SC, causal=True, scale=self._scale)[0])
        return self._write(q_TNC, parts, q_TNC.shape[2], out)


def gather_gqa(pool: torch.Tensor, layer: int, pages: torch.Tensor, starts: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """`workers.kernels.pages.gather_gqa`."""
    for page, (start, stop) in zip(pages.tolist(), itertools.pairwise(starts.tolist()), strict=True):
        for target, part in ((keys, 0), (values, 1)):
            tokens = pool[page, :, layer, part].transpose(0, 1)
            count = min(stop - start, len(tokens))  # the next row's begin where this one ends
            target[start : start + count] = tokens[:count]


def join_keys(nope_SND: torch.Tensor, rope_SR: torch.Tensor) -> torch.Tensor:
    """`workers.kernels.pages.join_keys`."""
    return torch.cat((nope_SND, rope_SR[:, None].expand(-1, nope_SND.shape[1], -1)), 2)


def install(patch: Any) -> None:
    """Puts all this in the place of the library and of the kernels, for a Hopper card that is not there."""
    library, kernels = types.ModuleType("flashinfer"), types.ModuleType("workers.kernels.pages")
    for cls in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper):
        setattr(library, cls.__name__, cls)
    library.mla = types.SimpleNamespace(BatchMLAPagedAttentionWrapper=BatchMLAPagedAttentionWrapper)  # type: ignore[attr-defined]
    kernels.gather_gqa, kernels.join_keys = gather_gqa, join_keys  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "flashinfer", library)
    patch.setitem(sys.modules, "workers.kernels.pages", kernels)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(multi_processor_count=32))
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    planned_in.clear()
