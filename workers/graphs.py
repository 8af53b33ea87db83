"""Decode steps as captured CUDA graphs, one per padded batch size. A replay costs the host one launch instead of several per layer.

    captured     tokens by slot -> model -> logits, over the addresses of `GraphInputs` and of the attention backend's own buffers
    every step   the batch fills the inputs, the backend plans its lengths, the graph is replayed on the stream of all other work

All graphs share one memory pool, largest first, since only one runs at a time. Logits are read before the next replay is launched behind
them on the same stream.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from workers.attention.base import AttentionBackend, AttentionBatch
from workers.batch import Batch, GraphInputs
from workers.models.decoder import DecoderModel
from workers.step import NULL_PAGE

_SMALL_SIZES = (1, 2, 4, 8)
_STEP_SIZE = 16
_NUM_WARM_UPS = 2  # kernels are built and tuned on first use, which must not happen while capturing

Progress = Callable[[str, int, int], None]


def captured_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes up to `max_num_seqs`: close together where a step is short."""
    sizes = [*_SMALL_SIZES, *range(_STEP_SIZE, 129, _STEP_SIZE), *range(160, max_num_seqs + 32, 32)]
    return sorted({min(size, max_num_seqs) for size in sizes})


class DecodeGraphs:
    """Captured on construction, which fills `batch.graphs`."""

    def __init__(self, model: DecoderModel, backend: AttentionBackend, batch: Batch, max_num_seqs: int, progress: Progress) -> None:
        self._backend = backend
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        sizes = captured_sizes(max_num_seqs)
        pool = None
        progress("graphs", 0, len(sizes))
        for number, size in enumerate(reversed(sizes), start=1):
            inputs = GraphInputs(size, size * batch.max_blocks, batch.null_slot, batch.last_tokens.device)
            backend.reserve_graph(size, size * batch.max_blocks)
            backend.begin_graph(_padding(inputs))

            def run(inputs: GraphInputs = inputs) -> torch.Tensor:
                hidden_BH = model(batch.last_tokens[inputs.slots], inputs.positions, backend)
                return model.logits(hidden_BH)

            for _ in range(_NUM_WARM_UPS):
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits_BV = run()
            pool = graph.pool()
            self._graphs[size] = graph, logits_BV
            batch.graphs.insert(0, inputs)
            progress("graphs", number, len(sizes))

    def replay(self, attention: AttentionBatch, num_rows: int) -> torch.Tensor:
        """Logits [rows, V] of a step that the batch has laid out for a graph; valid until the next replay."""
        self._backend.begin_graph(attention)
        graph, logits_BV = self._graphs[attention.num_rows]
        graph.replay()
        return logits_BV[:num_rows]


def _padding(inputs: GraphInputs) -> AttentionBatch:
    """A batch of padding alone."""
    size = inputs.size
    return AttentionBatch(
        num_decode_rows=size,
        query_starts=range(size + 1),
        seq_lens=np.ones(size, np.int64),
        device_seq_lens=inputs.seq_lens,
        block_table=inputs.slots,
        pages=inputs.pages,
        offsets=inputs.offsets,
        kv_pages=torch.full((size,), NULL_PAGE, dtype=torch.int32, device=inputs.slots.device),
        kv_starts=np.arange(size + 1, dtype=np.int32),
    )
