"""What attention needs to know about a step, and what a backend does for a layer.

A backend owns the reading and writing of pages. Each layer first writes the keys and values of the step's tokens, then reads them back
with everything before, so cached and new tokens are treated alike.

T tokens of the step, R rows, B blocks of the longest row, N query heads, K key-value heads, D head dimensions,
C latent, P = latent + rope dimensions of an MLA page
"""

from __future__ import annotations

import abc
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from workers.errors import UnsupportedConfig
from workers.kv.gates import LayerGates
from workers.kv.pool import PagePool
from workers.layers.rotary import rotate_, rotate_pairs

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (phase, done, in all)
Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin of a step's tokens, [T, 1, D / 2] each

BACKENDS: dict[str, str] = {
    "reference": "workers.attention.reference:ReferenceAttention",
    "torch_paged": "workers.attention.torch_paged:TorchPagedAttention",
    "flashinfer": "workers.attention.flashinfer:FlashInferAttention",
}
DEFAULT_BACKENDS = {"cpu": ["torch_paged"], "cuda": ["flashinfer", "torch_paged"]}  # the first that can do it


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One rank's attention. For MLA `head_dim` is unused, and `num_kv_heads` is 1.

    Query head n attends to key-value head `kv_head(n)` of the page. The groups of queries are of one size, except on ranks where the first
    or the last group is cut by the border of ranks (`first_query` says where in its group query head 0 stands).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    latent_dim: int = 0  # C; 0: GQA
    window: int | None = None  # tokens that a query sees, its own included; None: all
    group_size: int = 0  # query heads per key-value head in the whole model; 0: num_heads / num_kv_heads
    first_query: int = 0  # of query head 0, in its group

    def kv_head(self, head: int) -> int:
        return (self.first_query + head) // (self.group_size or self.num_heads // self.num_kv_heads)

    @property
    def has_equal_groups(self) -> bool:
        """Whether every key-value head of the page serves as many query heads as the others."""
        size, rest = divmod(self.num_heads, self.num_kv_heads)
        return rest == 0 and all(self.kv_head(head) == head // size for head in range(self.num_heads))


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Built once per step. Rows with one query token at the end of their sequence come first, then the others by number of query tokens.

    Lists are on the host and tensors on the device, so that no backend has to wait for the device to learn a length.
    """

    num_decode_rows: int
    query_starts: Sequence[int]  # R + 1; tokens of row r are [query_starts[r], query_starts[r + 1])
    seq_lens: Sequence[int]  # R; tokens whose keys are in the pages once this step has written its own
    device_seq_lens: torch.Tensor  # [R] the same, int64
    block_table: torch.Tensor  # [R, B] int64 pages, holes are the null page; empty for backends that do not read it
    pages: torch.Tensor  # [T] int64, where each token's keys and values go
    offsets: torch.Tensor  # [T] int64, position inside the page
    kv_pages: torch.Tensor | None = None  # on CUDA: the rows' pages one after the other, int32
    kv_starts: np.ndarray | None = None  # R + 1, int32 on the host: row r's are kv_pages[kv_starts[r]:kv_starts[r + 1]]
    captured_pages: int = 0  # room of the graph whose pages and offsets these are, with padding behind the tokens; 0: not captured

    @property
    def is_captured(self) -> bool:
        return self.captured_pages > 0

    @property
    def has_gates(self) -> bool:
        """Whether the pass waits for loaded pages layer by layer; captured decode steps would pay for it each time."""
        return not (self.is_captured and self.num_decode_rows)

    @property
    def num_rows(self) -> int:
        return len(self.seq_lens)

    def num_queries(self, row: int) -> int:
        return self.query_starts[row + 1] - self.query_starts[row]


class AttentionBackend(abc.ABC):
    """Attention of one rank over its pool. `begin` is called once per step, before any layer, and keeps `batch`."""

    has_graphs = False  # whether steps may be captured: `reserve_graph` and `begin_graph` are there
    few_keys = 0  # captured prompts of up to as many keys have graphs of their own
    reads_behind_end = True  # whether it multiplies by what lies behind the end of a row in its last page
    reads_block_table = True  # whether `AttentionBatch.block_table` is needed
    has_window = False  # whether `AttentionShape.window` is heeded
    has_unequal_groups = False  # whether shapes without equal groups are
    batch: AttentionBatch

    def __init__(self, shape: AttentionShape, pool: PagePool) -> None:
        self.shape = shape
        self.pool = pool
        self.gates: LayerGates | None = None  # the runner's, on CUDA

    def await_pages(self, layer: int) -> None:
        """Before the layer's pages are read: those that the step waits for."""
        if self.gates is not None and self.batch.has_gates:
            self.gates.wait(layer)

    def build(self, progress: Progress) -> None:  # noqa: B027 - most have nothing to build
        """Compiles what is compiled on first use, so that no step waits for it."""

    @abc.abstractmethod
    def begin(self, batch: AttentionBatch) -> None:
        """Prepares what all layers of the step share."""

    def reserve_graph(self, num_rows: int, num_tokens: int, max_pages: int) -> None:
        """Prepares for captured batches with up to `max_pages` pages in all: as many decode rows as tokens, or one row of a prompt."""
        raise AssertionError(f"{type(self).__name__} has no graphs")

    def begin_graph(self, batch: AttentionBatch) -> None:
        """`begin` for a captured batch."""
        raise AssertionError(f"{type(self).__name__} has no graphs")

    def rotate_and_write_gqa(
        self, layer: int, qkv_TMD: torch.Tensor, rope: Rope, norms: tuple[torch.Tensor, torch.Tensor, float] | None
    ) -> None:
        """Norms and rotates queries and keys of `qkv_TMD` [T, N + 2K, D], queries in place, and stores keys and values.

        `norms`: weights for queries and keys, eps.
        """
        q_TND, kv_TKD = qkv_TMD.split([self.shape.num_heads, 2 * self.shape.num_kv_heads], dim=1)
        if norms is not None:
            q_weight, k_weight, eps = norms
            k_TKD = kv_TKD[:, : self.shape.num_kv_heads]
            q_TND.copy_(F.rms_norm(q_TND, q_weight.shape, q_weight, eps))
            k_TKD.copy_(F.rms_norm(k_TKD, k_weight.shape, k_weight, eps))
        rotate_(qkv_TMD[:, : self.shape.num_heads + self.shape.num_kv_heads], *rope)
        self.write_gqa(layer, kv_TKD)

    def rotate_and_write_mla(
        self, layer: int, q_TND: torch.Tensor, latent_TP: torch.Tensor, rope: Rope, norm: tuple[torch.Tensor, float], interleaved: bool
    ) -> None:
        """Norms latents (`norm`: weight, eps), rotates keys and the rope part of queries, both in place, and stores latents and keys."""
        latent_dim = self.shape.latent_dim
        weight_C, eps = norm
        latent_TC, key_TR = latent_TP.split([latent_dim, latent_TP.shape[1] - latent_dim], dim=1)
        latent_TC.copy_(F.rms_norm(latent_TC, weight_C.shape, weight_C, eps))
        for x_TND in (q_TND[..., -key_TR.shape[1] :], key_TR.unsqueeze(1)):
            if interleaved:
                x_TND.copy_(rotate_pairs(x_TND, *rope))
            else:
                rotate_(x_TND, *rope)
        self.write_mla(layer, latent_TP)

    @abc.abstractmethod
    def write_gqa(self, layer: int, kv_TKD: torch.Tensor) -> None:
        """Stores rotated keys, then values, [T, 2K, D], of the step's tokens."""

    @abc.abstractmethod
    def gqa(self, layer: int, q_TND: torch.Tensor) -> torch.Tensor:
        """Attention output [T, N, D]."""

    @abc.abstractmethod
    def write_mla(self, layer: int, latent_TP: torch.Tensor) -> None:
        """Stores normed latents with rotated rope keys behind them."""

    @abc.abstractmethod
    def mla_absorbed(self, layer: int, q_TNC: torch.Tensor, rope_TNR: torch.Tensor, rows: range) -> torch.Tensor:
        """Attention of the tokens of `rows` over the latents themselves, [T, N, C]. Queries taken into the latent space, and their rope
        part."""

    @abc.abstractmethod
    def mla_plain(self, layer: int, q_TND: torch.Tensor, up_OC: torch.Tensor, value_dim: int, rows: range) -> torch.Tensor:
        """Attention of the tokens of `rows` over up-projected keys and values, [T, N, value_dim].

        `q_TND`: [nope, rope] dimensions per head. `up_OC`: kv_b_proj, per head nope rows, then value rows.
        """


def make_backend(name: str, shape: AttentionShape, pool: PagePool) -> AttentionBackend:
    """The backend of that name, or for "auto" the first of the device's that can do it, with a warning where that is not the fastest.

    UnsupportedConfig for a name that is not in the table, and for what a backend cannot do.
    """
    if name != "auto":
        return _make_backend(name, shape, pool)
    *faster, last = DEFAULT_BACKENDS[pool.tensor.device.type]
    for candidate in faster:
        try:
            return _make_backend(candidate, shape, pool)
        except UnsupportedConfig as error:
            log.warning("attention runs on the slower %s: %s", last, error)
    return _make_backend(last, shape, pool)


def _make_backend(name: str, shape: AttentionShape, pool: PagePool) -> AttentionBackend:
    if name not in BACKENDS:
        raise UnsupportedConfig(f"attention backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    cls: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    if reason := _why_not(cls, shape):
        raise UnsupportedConfig(f"attention backend {name} {reason}; choose torch_paged")
    return cls(shape, pool)


def _why_not(cls: type[AttentionBackend], shape: AttentionShape) -> str:
    """Empty where the backend can attend with this shape."""
    if shape.window is not None and not cls.has_window:
        return "has no sliding window"
    if not shape.has_equal_groups and not cls.has_unequal_groups:
        return "wants a tensor parallel size that divides num_key_value_heads or is a multiple of it"
    return ""
