"""What attention needs to know about a step, and what a backend does for a layer.

A backend owns the reading and writing of pages. Each layer first writes the keys and values of the step's tokens, then reads them back
with everything before, so cached and new tokens are treated alike.

T tokens of the step, R rows, B blocks of the longest row, N query heads, K key-value heads, D head dimensions,
C latent, P = latent + rope dimensions of an MLA page
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.errors import UnsupportedConfig
from workers.kv.pool import PagePool

BACKENDS: dict[str, str] = {
    "reference": "workers.attention.reference:ReferenceAttention",
    "torch_paged": "workers.attention.torch_paged:TorchPagedAttention",
}
DEFAULT_BACKEND = {"cpu": "torch_paged", "cuda": "torch_paged"}


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
    block_table: torch.Tensor  # [R, B] int64 pages; holes are the null page
    pages: torch.Tensor  # [T] int64, where each token's keys and values go
    offsets: torch.Tensor  # [T] int64, position inside the page

    @property
    def num_rows(self) -> int:
        return len(self.seq_lens)

    def num_queries(self, row: int) -> int:
        return self.query_starts[row + 1] - self.query_starts[row]


class AttentionBackend(abc.ABC):
    """Attention of one rank over its pool. `begin` is called once per step, before any layer, and keeps `batch`."""

    has_window = False  # whether `AttentionShape.window` is heeded
    has_unequal_groups = False  # whether shapes without equal groups are
    batch: AttentionBatch

    def __init__(self, shape: AttentionShape, pool: PagePool) -> None:
        self.shape = shape
        self.pool = pool

    @abc.abstractmethod
    def begin(self, batch: AttentionBatch) -> None:
        """Prepares what all layers of the step share."""

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
    def mla_absorbed(self, layer: int, q_TNP: torch.Tensor, rows: range) -> torch.Tensor:
        """Attention of the tokens of `rows` over the latents themselves, [T, N, C]. `q_TNP`: queries taken into the latent space."""

    @abc.abstractmethod
    def mla_plain(self, layer: int, q_TND: torch.Tensor, up_OC: torch.Tensor, value_dim: int, rows: range) -> torch.Tensor:
        """Attention of the tokens of `rows` over up-projected keys and values, [T, N, value_dim].

        `q_TND`: [nope, rope] dimensions per head. `up_OC`: kv_b_proj, per head nope rows, then value rows.
        """


def make_backend(name: str, shape: AttentionShape, pool: PagePool) -> AttentionBackend:
    """The backend of that name. "auto": the device's default, or torch_paged where that cannot attend with this shape.

    UnsupportedConfig for a name that is not in the table, and for a named backend that cannot.
    """
    chosen = DEFAULT_BACKEND[pool.tensor.device.type] if name == "auto" else name
    if chosen not in BACKENDS:
        raise UnsupportedConfig(f"attention backend {chosen!r} is unknown; known: {', '.join(BACKENDS)}")
    cls = _backend_class(chosen)
    reason = _why_not(cls, shape)
    if reason and name != "auto":
        raise UnsupportedConfig(f"attention backend {name} {reason}; choose torch_paged")
    return (_backend_class("torch_paged") if reason else cls)(shape, pool)


def _backend_class(name: str) -> type[AttentionBackend]:
    module, _, attribute = BACKENDS[name].partition(":")
    cls: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    return cls


def _why_not(cls: type[AttentionBackend], shape: AttentionShape) -> str:
    """Empty where the backend can attend with this shape."""
    if shape.window is not None and not cls.has_window:
        return "has no sliding window"
    if not shape.has_equal_groups and not cls.has_unequal_groups:
        return "wants a tensor parallel size that divides num_key_value_heads or is a multiple of it"
    return ""
