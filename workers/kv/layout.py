"""How keys and values lie in a rank's pages, and how a page relates to a stored block. Imports no torch.

GQA   page  [heads of the rank, layers, 2, block_size, head_dim]        block [kv_heads, layers, 2, block_size, head_dim]   part: a head
MLA   page  [layers, block_size, kv_lora_rank + rope_dim]               block: the same, once                               part: a layer

A page is a run of consecutive parts of its block, so a block written at one tensor-parallel size is read at another without conversion.
A key-value head whose queries span ranks is in the page of each, and written to the store by the first of them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from cache_store.keys import DTYPE_BYTES, Layout
from workers.models.config import ModelConfig, check_tensor_parallel, kv_heads_of_rank

DEFAULT_BLOCK_SIZE = {"gqa": 16, "mla": 64}  # tokens
_MAX_LOAD_RUNS = 4  # a forward pass begins when the first is there
_MIN_PIECE_BYTES = 128 << 10  # shorter copies take the host longer to queue than the link to do


class LoadRun(NamedTuple):
    """What of a page is loaded together. With the runs before it holds all of the layers before the next run's first."""

    first_layer: int
    starts: tuple[int, ...]  # in bytes, where its pieces begin
    num_bytes: int  # of each
    parts: range  # of the page's, which are whole with this run


@dataclass(frozen=True, slots=True)
class PageLayout:
    """One rank's part of a block. Parts are counted in the stored block; the written parts of all ranks are disjoint and together all."""

    store: Layout
    tensor_parallel_size: int
    rank: int
    page_shape: tuple[int, ...]
    dtype: str  # key of DTYPE_BYTES
    first_part: int
    num_parts: int
    first_written_part: int
    num_written_parts: int  # 0 on a rank that only shares another's head

    @property
    def page_bytes(self) -> int:
        return math.prod(self.page_shape) * DTYPE_BYTES[self.dtype]

    @property
    def block_size(self) -> int:
        return self.store.block_size

    @property
    def load_runs(self) -> list[LoadRun]:
        """In the order in which they are loaded, as many as their pieces are long enough for."""
        parts, part_bytes = range(self.num_parts), self.store.part_bytes
        if self.store.codec == "mla":
            return [
                LoadRun(run.start, (run.start * part_bytes,), len(run) * part_bytes, run) for run in _cut(self.num_parts, self.page_bytes)
            ]
        num_layers = self.store.part_shape[0]
        first, *more = _cut(num_layers, part_bytes)
        if not more:
            return [LoadRun(0, (0,), self.page_bytes, parts)]
        layer_bytes, last = part_bytes // num_layers, more[-1]
        return [
            LoadRun(
                run.start,
                tuple(part * part_bytes + run.start * layer_bytes for part in parts),
                len(run) * layer_bytes,
                parts if run == last else range(0),
            )
            for run in (first, *more)
        ]


def _cut(num_layers: int, num_bytes: int) -> list[range]:
    """Runs of the layers that lie one after the other in so many bytes."""
    count = max(1, min(_MAX_LOAD_RUNS, num_layers, num_bytes // _MIN_PIECE_BYTES))
    bounds = [num_layers * run // count for run in range(count + 1)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


def page_layout(config: ModelConfig, *, block_size: int | None, dtype: str, tensor_parallel_size: int, rank: int) -> PageLayout:
    """The layout of `rank`. UnsupportedConfig when the heads cannot be split so."""
    check_tensor_parallel(config, tensor_parallel_size)
    block_size = block_size or DEFAULT_BLOCK_SIZE[config.codec]
    make = _mla_layout if config.mla else _gqa_layout
    return make(config, block_size, dtype, tensor_parallel_size, rank)


def _gqa_layout(config: ModelConfig, block_size: int, dtype: str, tp: int, rank: int) -> PageLayout:
    part_shape = (config.num_layers, 2, block_size, config.head_dim)
    heads = kv_heads_of_rank(config, tp, rank)
    num_shared = kv_heads_of_rank(config, tp, rank - 1).stop - heads.start if rank else 0  # 1: the rank before writes the first head
    return PageLayout(
        store=Layout("gqa", 0, block_size, dtype, config.num_kv_heads, part_shape),
        tensor_parallel_size=tp,
        rank=rank,
        page_shape=(len(heads), *part_shape),
        dtype=dtype,
        first_part=heads.start,
        num_parts=len(heads),
        first_written_part=heads.start + num_shared,
        num_written_parts=len(heads) - num_shared,
    )


def _mla_layout(config: ModelConfig, block_size: int, dtype: str, tp: int, rank: int) -> PageLayout:
    assert config.mla
    part_shape = (block_size, config.mla.kv_lora_rank + config.mla.rope_dim)
    first_written, last_written = (config.num_layers * r // tp for r in (rank, rank + 1))
    return PageLayout(
        store=Layout("mla", 0, block_size, dtype, config.num_layers, part_shape),
        tensor_parallel_size=tp,
        rank=rank,
        page_shape=(config.num_layers, *part_shape),
        dtype=dtype,
        first_part=0,
        num_parts=config.num_layers,
        first_written_part=first_written,
        num_written_parts=last_written - first_written,
    )
