"""A rank without a model: its answer to a plan is a function of the plan. It measures what dispatch alone costs, and tests the group.

Needs no torch, so its processes start in a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cache_store.keys import Layout
from workers.config import WorkerConfig
from workers.kv.layout import PageLayout
from workers.step import RowResult, StepPlan
from workers.wire import build_rows

_NUM_PAGES = 64
_NUM_LAYERS = 2
_HEAD_DIM = 32
_VOCAB_SIZE = 1 << 16
_MAX_NUM_BATCHED_TOKENS = 2048


class NoCommunicator(NamedTuple):
    """Stands where `workers.parallel.Communicator` does, for runners that talk to no other rank."""

    rank: int
    world_size: int

    @classmethod
    def single(cls, device: str) -> NoCommunicator:
        return cls(0, 1)

    @staticmethod
    def host(world_size: int, host: str = "127.0.0.1") -> NoRendezvous:
        return NoRendezvous()

    @classmethod
    def connect(cls, rank: int, world_size: int, host: str, port: int, device: str, store: Any = None) -> NoCommunicator:
        return cls(rank, world_size)

    def close(self) -> None:
        pass


class NoRendezvous(NamedTuple):
    port: int = 0

    def close(self) -> None:
        pass


class HostPages:
    """`workers.kv.pool.PagePool` in numpy."""

    def __init__(self, layout: PageLayout, num_pages: int) -> None:
        self.num_pages = num_pages
        self.tensor = np.zeros((num_pages, layout.page_bytes), np.uint8)

    def page_bytes(self, page: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        page_bytes: np.ndarray[Any, np.dtype[np.uint8]] = self.tensor[page]
        return page_bytes


class EchoRunner:
    """Samples, for every row, its own id. One GQA head per rank."""

    def __init__(self, config: WorkerConfig, comm: Any, progress: Any) -> None:
        block_size = config.block_size or 16
        part_shape = (_NUM_LAYERS, 2, block_size, _HEAD_DIM)
        store = Layout("gqa", 0, block_size, "float32", comm.world_size, part_shape)
        self.layout = PageLayout(store, comm.world_size, comm.rank, (1, *part_shape), "float32", comm.rank, 1, comm.rank, 1)
        self.pool = HostPages(self.layout, _NUM_PAGES)
        self.info_fields = {
            "num_pages": _NUM_PAGES,
            "block_size": block_size,
            "max_model_len": config.max_model_len or _NUM_PAGES * block_size,
            "vocab_size": _VOCAB_SIZE,
            "layout": store,
            "model_config": b"echo",
            "weights_digest": b"echo",
            "compute_dtype": "float32",
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens or _MAX_NUM_BATCHED_TOKENS,
            "max_prompt_tokens_beside_outputs": _MAX_NUM_BATCHED_TOKENS,
        }
        progress("echo", 1, 1)

    is_asynchronous = False
    gates = None

    def launch(self, plan: StepPlan, before_forward: Callable[[bool], None]) -> StepPlan:
        before_forward(False)
        return plan

    def collect(self, plan: StepPlan) -> list[RowResult]:
        row_ids = [row.row_id for row in plan.rows]
        none = [None] * len(row_ids)
        return build_rows(RowResult, [row_ids, [[row_id] for row_id in row_ids], none, none])

    def close(self) -> None:
        pass
