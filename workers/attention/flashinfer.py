"""Attention by FlashInfer's kernels over strided per-layer views of the pool. Bfloat16 and float16 on CUDA.

    decode rows             GQA: paged decode on tensor cores      MLA: paged latent attention, absorbed
    other rows              GQA: paged prefill, causal; where      MLA: the same for short suffixes; else latents are projected up and
                            queries are many, keys and values      attended as a ragged batch, key range by key range where they are many
                            are first copied together: the
                            kernel is 15-20% faster on them

A wrapper of FlashInfer is planned once per step, on the host, and run once per layer. `plan` stages its numbers in pinned memory that the
device reads later, so each wrapper has two of these in turn: with two steps launched, the one before last is done. Log-sum-exps are to
base 2.

T tokens, R rows, N query heads, K key-value heads, D head dimensions, C latent, P = latent + rope, V value dimensions, S keys
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from workers.attention.base import AttentionBackend, AttentionBatch, AttentionShape, Progress, Rope
from workers.errors import UnsupportedConfig
from workers.kv.pool import PagePool

WORKSPACE_BYTES = 256 << 20
PROJECTED_BYTES = 1 << 30  # of up-projected keys and values at once
GATHERED_BYTES = 1 << 30  # of one layer's keys and values, copied together
_GATHER_QUERIES = 512  # per key, at which the copy pays
_SPLIT_KEYS = 2048  # of a row, from which splitting them pays
_HEAD_DIMS = (64, 128, 256)
_LATENT_DIMS, _PROJECTED_DIMS = (512, 64), (192, 128)  # latent and rope; query-key and value of the plain form
_QUERY_TILE = 128  # queries times group
_UP_SLACK = 128  # dimensions per head that the projection holds besides keys and values: the nope part, before it is joined to the rope


class _Planned:
    """One wrapper, whose pinned staging memory alternates. Takes a step's lengths from the host."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        first = wrapper._pin_memory_int_workspace_buffer
        self._staging = [first, torch.empty_like(first).pin_memory()]

    def plan(self, *arguments: Any, **options: Any) -> None:
        self._staging.reverse()
        self.wrapper._pin_memory_int_workspace_buffer = self._staging[0]
        self.wrapper.plan(*arguments, **options)


class _Gathering(NamedTuple):
    """Rows whose keys and values are copied together, one row after the other."""

    pages: torch.Tensor  # int32
    starts: torch.Tensor  # int32: where the tokens of each page go, and where they end
    buffers: tuple[torch.Tensor, torch.Tensor]  # keys and values [S, K, D], written anew by each layer


class FlashInferAttention(AttentionBackend):
    """UnsupportedConfig where FlashInfer is missing or has no kernel for the shape."""

    has_window = True
    has_graphs = True
    reads_behind_end = False
    reads_block_table = False

    def __init__(self, shape: AttentionShape, pool: PagePool) -> None:
        super().__init__(shape, pool)
        self._check()
        self._is_mla = shape.latent_dim > 0
        self._window_left = -1 if shape.window is None else shape.window - 1
        self._flashinfer = importlib.import_module("flashinfer")
        self._kernels = importlib.import_module("workers.kernels.pages")  # needs Triton
        self._kernel = "fa3" if torch.cuda.get_device_capability(pool.tensor.device)[0] == 9 else "fa2"
        self._block_size = pool.layout.block_size
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.tensor.device)
        self._layers = self._views()
        self._decode = self._new_decode()
        self._prefill = None if self._is_mla else self._new_prefill(self._kernel)
        self._short = None if self._is_mla else self._new_prefill("fa2")
        self._num_processors = torch.cuda.get_device_properties(pool.tensor.device).multi_processor_count
        self._absorbed = _Planned(self._new_mla()) if self._is_mla else None
        self._ragged: list[_Planned] = []
        self._gathering: _Gathering | None = None  # of this step
        self._ranges: list[torch.Tensor] | None = None  # of keys, for plain rows of this step
        self._planned_rows: range | None = None  # of `_absorbed`
        self._graphs: dict[tuple[int, int], _Planned] = {}  # by captured rows and tokens
        self._captured_out: torch.Tensor | None = None  # [T, N, ...] of captured prompts: behind the last query stays what was there
        self._extending: _Planned | None = None  # of this step: `_prefill` or `_short`
        self._active: _Planned | None = None  # the captured one of this step; None: eager

    def _check(self) -> None:
        shape, tensor = self.shape, self.pool.tensor
        if not tensor.is_cuda or tensor.dtype not in (torch.bfloat16, torch.float16):
            raise UnsupportedConfig(f"flashinfer runs bfloat16 and float16 on CUDA, not {tensor.dtype} on {tensor.device.type}")
        if shape.latent_dim:
            dims = (shape.latent_dim, tensor.shape[-1] - shape.latent_dim)
            if dims != _LATENT_DIMS:
                raise UnsupportedConfig(f"flashinfer's latent attention has kernels for {_LATENT_DIMS} dimensions, not {dims}")
        elif shape.head_dim not in _HEAD_DIMS:
            raise UnsupportedConfig(f"flashinfer has kernels for head dimensions {_HEAD_DIMS}, not {shape.head_dim}")
        try:
            importlib.import_module("flashinfer")
        except ImportError as error:
            raise UnsupportedConfig(f"flashinfer is not installed (pip install 'mobula[gpu]'): {error}") from error

    def _views(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer what the kernels read: keys and values [pages, K, block, D], or latents and rope keys [pages, block, ...]."""
        tensor = self.pool.tensor
        if self._is_mla:
            latent_dim = self.shape.latent_dim
            return [(tensor[:, layer, :, :latent_dim], tensor[:, layer, :, latent_dim:]) for layer in range(tensor.shape[1])]
        return [(tensor[:, :, layer, 0], tensor[:, :, layer, 1]) for layer in range(tensor.shape[2])]

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
        if self._absorbed is not None:
            plans = [partial(self._plan_mla, self._absorbed, range(1)), partial(self._plan_ranges, range(1), *_PROJECTED_DIMS)]
        else:
            assert self._prefill
            assert self._short
            plans = [
                partial(self._plan_decode, self._decode, range(1)),
                partial(self._plan_prefill, self._prefill, range(1)),
                partial(self._plan_prefill, self._short, range(1)),
            ]
        progress("kernels", 0, len(plans))
        with ThreadPoolExecutor(len(plans), initializer=torch.cuda.set_device, initargs=(device,)) as executor:
            for number, built in enumerate([executor.submit(plan) for plan in plans], start=1):
                built.result()
                progress("kernels", number, len(plans))

    # Wrappers

    def _new_decode(self, buffers: dict[str, torch.Tensor] | None = None) -> _Planned:
        if self._is_mla:
            return _Planned(self._new_mla(buffers))
        return _Planned(
            self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "HND",
                use_tensor_cores=True,
                use_cuda_graph=buffers is not None,
                paged_kv_indptr_buffer=buffers and buffers["starts"],
                paged_kv_indices_buffer=buffers and buffers["pages"],
                paged_kv_last_page_len_buffer=buffers and buffers["lengths"],
            )
        )

    def _new_mla(self, buffers: dict[str, torch.Tensor] | None = None) -> Any:
        return self._flashinfer.mla.BatchMLAPagedAttentionWrapper(
            self._workspace,
            use_cuda_graph=buffers is not None,
            qo_indptr=buffers and buffers["query_starts"],
            kv_indptr=buffers and buffers["starts"],
            kv_indices=buffers and buffers["pages"],
            kv_len_arr=buffers and buffers["lengths"],
            backend=self._kernel,
        )

    def _new_prefill(self, kernel: str, buffers: dict[str, torch.Tensor] | None = None) -> _Planned:
        return _Planned(
            self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace,
                "HND",
                use_cuda_graph=buffers is not None,
                qo_indptr_buf=buffers and buffers["query_starts"],
                paged_kv_indptr_buf=buffers and buffers["starts"],
                paged_kv_indices_buf=buffers and buffers["pages"],
                paged_kv_last_page_len_buf=buffers and buffers["lengths"],
                backend=kernel,
            )
        )

    # A step

    def begin(self, batch: AttentionBatch) -> None:
        self.batch = batch
        self._active = None
        self._planned_rows = self._ranges = self._gathering = None
        if self._is_mla:
            return  # planned once the layers have said which rows they absorb
        if batch.num_decode_rows:
            self._plan_decode(self._decode, range(batch.num_decode_rows))
        if batch.num_decode_rows < batch.num_rows:
            rows = range(batch.num_decode_rows, batch.num_rows)
            if self._is_gathered(rows):
                self._plan_gathering(rows)
                return
            self._extending = self._short if self._is_short(rows) else self._prefill
            assert self._extending
            self._plan_prefill(self._extending, rows)

    def _is_short(self, rows: range) -> bool:
        """Whether queries alone would leave most of the GPU idle while keys are many. Of the two kernels only fa2 also splits these."""
        group = self.shape.num_heads // self.shape.num_kv_heads
        tiles = sum(-(-self.batch.num_queries(row) * group // _QUERY_TILE) for row in rows) * self.shape.num_kv_heads
        return 4 * tiles <= self._num_processors and max(self.batch.seq_lens[rows.start : rows.stop]) >= _SPLIT_KEYS

    def _is_gathered(self, rows: range) -> bool:
        """Whether each key is read by so many queries that copying it costs less than looking it up in its page does every time."""
        if self._kernel != "fa3":
            return False
        num_keys, num_pairs = 0, 0.0
        for row in rows:
            length, count = self.batch.seq_lens[row], self.batch.num_queries(row)
            num_keys += length
            num_pairs += count * (length - count / 2)
        token_bytes = 2 * self.shape.num_kv_heads * self.shape.head_dim * self.pool.tensor.element_size()
        return num_pairs >= _GATHER_QUERIES * num_keys and num_keys * token_bytes <= GATHERED_BYTES

    def reserve_graph(self, num_rows: int, num_tokens: int, max_pages: int) -> None:
        """A wrapper of its own, whose addresses stay."""
        device = self.pool.tensor.device

        def integers(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        buffers = {
            "query_starts": integers(num_rows + 1),
            "starts": integers(num_rows + 1),
            "lengths": integers(num_rows),
            "pages": integers(max_pages),
        }
        is_prompt = num_tokens > num_rows
        self._graphs[num_rows, num_tokens] = (
            self._new_prefill("fa2", buffers) if is_prompt and not self._is_mla else self._new_decode(buffers)
        )
        if is_prompt and (self._captured_out is None or len(self._captured_out) < num_tokens):
            shape = (num_tokens, self.shape.num_heads, self.shape.latent_dim or self.shape.head_dim)
            self._captured_out = torch.zeros(shape, dtype=self.pool.tensor.dtype, device=device)

    def begin_graph(self, batch: AttentionBatch) -> None:
        """`begin` for a batch that runs as a captured graph, of as many rows and tokens as were reserved."""
        self.batch = batch
        self._active = self._graphs[batch.num_rows, len(batch.pages)]
        rows = range(batch.num_rows)
        if self._is_mla:
            self._plan_mla(self._active, rows)
        elif batch.num_decode_rows:
            self._plan_decode(self._active, rows)
        else:
            self._plan_prefill(self._active, rows)

    def _run_captured(self, *tensors: Any) -> torch.Tensor:
        """Attention of a captured batch, queries first."""
        assert self._active
        out = None
        if not self.batch.num_decode_rows:
            assert self._captured_out is not None
            out = self._captured_out[: len(tensors[0])]
        return self._active.wrapper.run(*tensors, out=out)

    def _tables(self, rows: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of some rows: where their pages begin (host), their pages (device), and their lengths (host); int32."""
        batch = self.batch
        assert batch.kv_starts is not None
        assert batch.kv_pages is not None
        starts = batch.kv_starts[rows.start : rows.stop + 1]
        lengths = np.asarray(batch.seq_lens[rows.start : rows.stop], np.int32)
        return torch.from_numpy(starts - starts[0]), batch.kv_pages[starts[0] : starts[-1]], torch.from_numpy(lengths)

    def _query_starts(self, rows: range) -> torch.Tensor:
        starts = np.asarray(self.batch.query_starts[rows.start : rows.stop + 1], np.int32)
        return torch.from_numpy(starts - starts[0])

    def _plan_decode(self, planned: _Planned, rows: range) -> None:
        starts, pages, lengths = self._tables(rows)
        planned.plan(
            starts, pages, (lengths - 1) % self._block_size + 1, self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim,
            self._block_size, q_data_type=self.pool.tensor.dtype, kv_data_type=self.pool.tensor.dtype, sm_scale=self.shape.scale,
            seq_lens=lengths, window_left=self._window_left,
        )  # fmt: skip

    def _plan_prefill(self, planned: _Planned, rows: range) -> None:
        starts, pages, lengths = self._tables(rows)
        planned.plan(
            self._query_starts(rows), starts, pages, (lengths - 1) % self._block_size + 1, self.shape.num_heads, self.shape.num_kv_heads,
            self.shape.head_dim, self._block_size, causal=True, sm_scale=self.shape.scale, q_data_type=self.pool.tensor.dtype,
            kv_data_type=self.pool.tensor.dtype, seq_lens=lengths, window_left=self._window_left,
        )  # fmt: skip

    def _plan_gathering(self, rows: range) -> None:
        host_starts, pages, host_lengths = self._tables(rows)
        starts, lengths = host_starts.numpy(), host_lengths.numpy()
        ends, counts = np.cumsum(lengths), np.diff(starts)
        first = np.repeat(ends - lengths, counts) + (np.arange(starts[-1]) - np.repeat(starts[:-1], counts)) * self._block_size
        on_device = torch.from_numpy(np.append(first, ends[-1]).astype(np.int32)).pin_memory().to(pages.device, non_blocking=True)
        shape = (int(ends[-1]), self.shape.num_kv_heads, self.shape.head_dim)
        keys, values = (torch.empty(shape, dtype=self.pool.tensor.dtype, device=pages.device) for _ in range(2))
        self._gathering = _Gathering(pages, on_device, (keys, values))
        (planned,) = self._ragged_wrappers(1)
        self._plan_ragged(planned, rows, lengths, self.shape.num_kv_heads, self.shape.head_dim, self.shape.head_dim, causal=True)

    def _plan_ragged(
        self, planned: _Planned, rows: range, num_keys: np.ndarray, num_kv_heads: int, key_dim: int, value_dim: int, *, causal: bool
    ) -> None:
        """`num_keys` of each row."""
        dtype = self.pool.tensor.dtype
        planned.plan(
            self._query_starts(rows), torch.from_numpy(np.concatenate(([0], np.cumsum(num_keys))).astype(np.int32)),
            self.shape.num_heads, num_kv_heads, key_dim, value_dim, causal=causal, sm_scale=self.shape.scale, q_data_type=dtype,
            kv_data_type=dtype, window_left=self._window_left,
        )  # fmt: skip

    def _ragged_wrappers(self, count: int) -> list[_Planned]:
        while len(self._ragged) < count:
            wrapper = self._flashinfer.BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD", backend=self._kernel)
            self._ragged.append(_Planned(wrapper))
        return self._ragged[:count]

    def _plan_mla(self, planned: _Planned, rows: range) -> None:
        starts, pages, lengths = self._tables(rows)
        dtype = self.pool.tensor.dtype
        planned.plan(
            self._query_starts(rows), starts, pages, lengths, self.shape.num_heads, *_LATENT_DIMS, self._block_size,
            True, self.shape.scale, dtype, dtype,
        )  # fmt: skip

    # Grouped-query attention

    def rotate_and_write_gqa(
        self, layer: int, qkv_TMD: torch.Tensor, rope: Rope, norms: tuple[torch.Tensor, torch.Tensor, float] | None
    ) -> None:
        batch = self.batch
        self._kernels.rotate_and_write_gqa(qkv_TMD, self.shape.num_heads, rope, norms, self.pool.tensor, layer, batch.pages, batch.offsets)

    def write_gqa(self, layer: int, kv_TKD: torch.Tensor) -> None:
        keys_TKD, values_TKD = kv_TKD.chunk(2, dim=1)
        keys, values = self._layers[layer]
        keys[self.batch.pages, :, self.batch.offsets] = keys_TKD
        values[self.batch.pages, :, self.batch.offsets] = values_TKD

    def gqa(self, layer: int, q_TND: torch.Tensor) -> torch.Tensor:
        if self._active is not None:
            return self._run_captured(q_TND, self._layers[layer])
        num_decode = self.batch.num_decode_rows
        out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
        if num_decode:
            self._decode.wrapper.run(q_TND[:num_decode], self._layers[layer], out=out_TND[:num_decode])
        if num_decode == len(q_TND):
            return out_TND
        if self._gathering is not None:
            pages, starts, buffers = self._gathering
            self._kernels.gather_gqa(self.pool.tensor, layer, pages, starts, *buffers)
            self._ragged[0].wrapper.run(q_TND[num_decode:], *buffers, out=out_TND[num_decode:])
        else:
            assert self._extending
            self._extending.wrapper.run(q_TND[num_decode:], self._layers[layer], out=out_TND[num_decode:])
        return out_TND

    # Latent attention

    def rotate_and_write_mla(
        self, layer: int, q_TND: torch.Tensor, latent_TP: torch.Tensor, rope: Rope, norm: tuple[torch.Tensor, float], interleaved: bool
    ) -> None:
        batch, nope_dim = self.batch, q_TND.shape[2] - _LATENT_DIMS[1]
        write = self._kernels.rotate_and_write_mla
        write(q_TND, latent_TP, nope_dim, rope, norm, interleaved, self.pool.tensor, layer, batch.pages, batch.offsets)

    def write_mla(self, layer: int, latent_TP: torch.Tensor) -> None:
        self.pool.tensor[self.batch.pages, layer, self.batch.offsets] = latent_TP

    def mla_absorbed(self, layer: int, q_TNC: torch.Tensor, rope_TNR: torch.Tensor, rows: range) -> torch.Tensor:
        if self._active is not None:
            return self._run_captured(q_TNC, rope_TNR, *self._layers[layer])
        assert self._absorbed
        if self._planned_rows != rows:
            self._plan_mla(self._absorbed, rows)
            self._planned_rows = rows
        return self._absorbed.wrapper.run(q_TNC, rope_TNR, *self._layers[layer])

    def mla_plain(self, layer: int, q_TND: torch.Tensor, up_OC: torch.Tensor, value_dim: int, rows: range) -> torch.Tensor:
        if (q_TND.shape[2], value_dim) != _PROJECTED_DIMS:
            raise UnsupportedConfig(
                f"flashinfer's ragged latent attention has kernels for {_PROJECTED_DIMS}, not {q_TND.shape[2], value_dim}"
            )
        if self._ranges is None:
            self._ranges = self._plan_ranges(rows, q_TND.shape[2], value_dim)
        merged: tuple[torch.Tensor, torch.Tensor] | None = None
        for planned, token_rows in zip(self._ragged, self._ranges, strict=False):
            keys_SND, values_SNV = self._project(layer, token_rows, up_OC, value_dim)
            if len(self._ranges) == 1:
                return planned.wrapper.run(q_TND, keys_SND, values_SNV)
            part = planned.wrapper.run(q_TND, keys_SND, values_SNV, return_lse=True)
            merged = part if merged is None else _merge(*merged, *part)
        assert merged
        return merged[0]

    def _project(self, layer: int, token_rows: torch.Tensor, up_OC: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [S, N, D] and values [S, N, V] of tokens that lie at `token_rows` of layer 0."""
        width = self.pool.tensor.shape[-1]
        flat = self.pool.tensor.view(-1, width)[layer * self._block_size :]
        latent_SC, rope_SR = flat[token_rows].split([self.shape.latent_dim, width - self.shape.latent_dim], dim=1)
        up_SNO = F.linear(latent_SC, up_OC).unflatten(1, (self.shape.num_heads, -1))
        nope_SND, values_SNV = up_SNO.tensor_split([up_SNO.shape[2] - value_dim], dim=2)
        return self._kernels.join_keys(nope_SND, rope_SR), values_SNV

    def _plan_ranges(self, rows: range, key_dim: int, value_dim: int) -> list[torch.Tensor]:
        """Plans a ragged wrapper for each range of keys; returns where the range's tokens lie.

        One range if everything fits: causal. Else the step's own tokens, causal, then what was there before in bounded pieces.
        """
        batch = self.batch
        lengths = [batch.seq_lens[row] for row in rows]
        own = [batch.num_queries(row) for row in rows]
        token_bytes = self.shape.num_heads * (key_dim + value_dim + _UP_SLACK) * self.pool.tensor.element_size()
        max_tokens = max(self._block_size, PROJECTED_BYTES // token_bytes)
        if sum(lengths) <= max_tokens:
            ranges = [([0] * len(lengths), lengths)]
        else:
            before = [length - count for length, count in zip(lengths, own, strict=True)]
            ranges = [(before, lengths)]
            step = max(self._block_size, max_tokens // len(lengths))
            for start in range(0, max(before), step):
                ranges.append(([min(start, stop) for stop in before], [min(start + step, stop) for stop in before]))
        places = []
        for number, (planned, (starts, stops)) in enumerate(zip(self._ragged_wrappers(len(ranges)), ranges, strict=True)):
            self._plan_ragged(planned, rows, np.subtract(stops, starts), self.shape.num_heads, key_dim, value_dim, causal=number == 0)
            places.append(self._token_rows(rows, starts, stops))
        return places

    def _token_rows(self, rows: range, starts: list[int], stops: list[int]) -> torch.Tensor:
        """Rows of the pool, seen as [pages * layers * block, P], that hold positions [start, stop) of each row in layer 0; int64."""
        batch, pieces = self.batch, []
        assert batch.kv_starts is not None
        assert batch.kv_pages is not None
        stride = self.pool.tensor.shape[1] * self._block_size
        for row, start, stop in zip(rows, starts, stops, strict=True):
            first = batch.kv_starts[row]
            pages = batch.kv_pages[first + start // self._block_size : first + -(-stop // self._block_size)].long()
            within = torch.arange(self._block_size, device=pages.device)
            skipped = start - start % self._block_size
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
