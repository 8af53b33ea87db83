"""Steps as captured CUDA graphs: a replay costs the host one launch instead of dozens.

    decode rows alone           one graph from tokens to logits, per padded number of rows
    one short rest of a prompt  the same, per padded number of tokens (and again for few keys, where the backend attends otherwise then): a
                                step so short would wait for the host that launches its kernels
    anything else               a graph for what lies between two attentions, per layer and padded number of tokens; attention itself, which
                                depends on the rows, is launched between them

A step fills the inputs that graphs read and the backend plans its lengths; then graphs are replayed on the stream of all other work. All
share one memory pool, largest first, since only one runs at a time; results are read before the next replay is launched behind them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from workers.attention.base import AttentionBackend, AttentionBatch, Rope
from workers.batch import Batch, GraphInputs
from workers.models.decoder import DecoderLayer, DecoderModel
from workers.step import NULL_PAGE

_SMALL_SIZES = (1, 2, 4, 8)
_STEP_SIZE = 16
_PROMPT_SIZES = (16, 32, 64, 96, 128, 192, 256)
_NUM_WARM_UPS = 2  # kernels are built and tuned on first use, which must not happen while capturing

Progress = Callable[[str, int, int], None]
Recorded = TypeVar("Recorded")


def captured_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes up to `max_num_seqs`: close together where a step is short."""
    sizes = [*_SMALL_SIZES, *range(_STEP_SIZE, 129, _STEP_SIZE), *range(160, max_num_seqs + 32, 32)]
    return sorted({min(size, max_num_seqs) for size in sizes})


def captured_prompts(max_tokens: int) -> list[int]:
    """Padded numbers of tokens of one prompt."""
    return sorted({min(size, max_tokens) for size in _PROMPT_SIZES} - {0, 1})


def captured_pages(size: int, batch: Batch, few_keys: int) -> set[int]:
    """Bounds on the pages of a captured prompt of `size` tokens."""
    few = few_keys // batch.block_size
    return {few, batch.max_blocks} if size <= few * batch.block_size < batch.max_model_len else {batch.max_blocks}


class StepGraphs:
    """Captured on construction, which fills the batch's lists of them."""

    def __init__(
        self, model: DecoderModel, backend: AttentionBackend, batch: Batch, max_num_seqs: int, max_tokens: int, progress: Progress
    ) -> None:
        """`max_tokens` of a step."""
        self._model, self._backend, self._batch = model, backend, batch
        self._graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        device = batch.last_tokens.device
        self._nothing = torch.zeros(1, device=device)
        shapes = [(size, size, size * batch.max_blocks) for size in captured_sizes(max_num_seqs)]
        for size in captured_prompts(min(max_tokens, batch.max_model_len)):
            shapes += [(1, size, num_pages) for num_pages in captured_pages(size, batch, backend.few_keys)]
        pool = None
        progress("graphs", 0, len(shapes))
        for number, shape in enumerate(sorted(shapes, key=lambda shape: (-shape[1], -shape[2])), start=1):
            inputs = GraphInputs(*shape, batch.null_slot, device)
            self._graphs[shape] = graph, _ = self._capture(inputs, pool)
            pool = graph.pool()
            (batch.prompt_graphs if inputs.is_prompt else batch.decode_graphs).insert(0, inputs)
            progress("graphs", number, len(shapes))

    def _capture(self, inputs: GraphInputs, pool: tuple[int, int] | None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The graph, and where it leaves the logits [rows, V]."""
        self._backend.reserve_graph(inputs.num_rows, inputs.num_tokens, inputs.max_pages)
        self._backend.begin_graph(_padding(inputs, self._batch.block_size))

        def run() -> torch.Tensor:
            ids_T = inputs.ids if inputs.is_prompt else self._batch.last_tokens[inputs.slots]
            hidden_TH = self._model(ids_T, inputs.positions, self._backend)
            return self._model.logits(hidden_TH[inputs.last] if inputs.is_prompt else hidden_TH)

        for _ in range(_NUM_WARM_UPS):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = run()
        return graph, logits

    def replay(self, attention: AttentionBatch, num_rows: int, before: Callable[[], None]) -> torch.Tensor:
        """Logits [rows, V] of a step that the batch has laid out for a graph; valid until the next replay. Calls `before` when all is ready
        for it."""
        self._backend.begin_graph(attention)
        if attention.has_gates:
            self._nothing.zero_()  # behind a DMA the next thing on a stream waits for all DMA queued until then, of whatever stream
        before()
        graph, logits_BV = self._graphs[attention.num_rows, len(attention.pages), attention.captured_pages]
        graph.replay()
        return logits_BV[:num_rows]


class PieceGraphs:
    """Captured on construction, for steps of up to `max_tokens`. What passes between graphs and attention lies in shared buffers."""

    def __init__(self, model: DecoderModel, backend: AttentionBackend, max_tokens: int, device: torch.device, progress: Progress) -> None:
        self._model = model
        self._backend = backend
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs = torch.zeros((4, max_tokens), dtype=torch.int64, device=device)  # ids, positions, pages, offsets
        self._queries: torch.Tensor | None = None  # [T, N, D]
        self._attended: torch.Tensor | None = None  # [T, O]
        self._hidden: torch.Tensor | None = None  # [T, H]
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}  # by size; one more than layers
        sizes = piece_sizes(max_tokens)
        progress("pieces", 0, len(sizes))
        for number, size in enumerate(reversed(sizes), start=1):
            self._graphs[size] = self._capture(size)
            progress("pieces", number, len(sizes))

    def run(self, ids_T: torch.Tensor, positions_T: torch.Tensor, batch: AttentionBatch) -> torch.Tensor | None:
        """Hidden states [T, H], as DecoderModel.forward, valid until the next run; None when the step is too large. The backend has begun
        the batch."""
        count = len(ids_T)
        size = min((size for size in self._graphs if size >= count), default=0)
        if not size:
            return None
        assert self._queries is not None
        assert self._attended is not None
        assert self._hidden is not None
        self._inputs[:, :size] = 0
        self._inputs[:, :count] = torch.stack((ids_T, positions_T, batch.pages, batch.offsets))
        *before, last = self._graphs[size]
        queries, attended = self._queries[:count], self._attended[:count]
        for graph, layer in zip(before, self._model.layers, strict=True):
            graph.replay()
            attended.copy_(layer.self_attn.attend(queries, self._backend))
        last.replay()
        return self._hidden[:count]

    def _capture(self, size: int) -> list[torch.cuda.CUDAGraph]:
        ids, positions, pages, offsets = self._inputs[:, :size].unbind()
        self._backend.batch = AttentionBatch(0, [0, size], [size], pages, pages[:0, None], pages, offsets)  # where to write
        layers: list[DecoderLayer] = list(self._model.layers)

        def first() -> tuple[torch.Tensor, Rope]:
            rope = self._model.rope(positions)
            queries, x_TH = layers[0].before(self._model.embed_tokens(ids), None, rope, self._backend)
            self._queries = _keep(self._queries, queries)
            return x_TH, rope

        graph, (x_TH, rope) = self._record(first)
        graphs = [graph]
        if self._attended is None:
            self._attended = x_TH.new_zeros((size, layers[0].self_attn.o_proj.weight.shape[1]))
        attended = self._attended[:size]

        def between(layer: DecoderLayer, following: DecoderLayer, x_TH: torch.Tensor) -> torch.Tensor:
            x_TH, delta_TH = layer.after(x_TH, attended)
            queries, x_TH = following.before(x_TH, delta_TH, rope, self._backend)
            self._queries = _keep(self._queries, queries)
            return x_TH

        for layer, following in itertools.pairwise(layers):
            graph, x_TH = self._record(partial(between, layer, following, x_TH))
            graphs.append(graph)

        def last() -> None:
            last_TH, delta_TH = layers[-1].after(x_TH, attended)
            self._hidden = _keep(self._hidden, last_TH + delta_TH)

        return [*graphs, self._record(last)[0]]

    def _record(self, piece: Callable[[], Recorded]) -> tuple[torch.cuda.CUDAGraph, Recorded]:
        """Runs the piece once, so that kernels are built, and then captures it."""
        piece()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = piece()
        return graph, result


def _keep(buffer: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """Copies into a buffer that is made for the first, largest value."""
    if buffer is None:
        return value.clone()
    buffer[: len(value)] = value
    return buffer


def piece_sizes(max_tokens: int) -> list[int]:
    """Padded numbers of tokens up to `max_tokens`: close together, since padding is computed like any other token."""
    sizes = [16, 32, 64, 96, *range(128, 512, 64), *range(512, 1024, 128), *range(1024, max_tokens + 256, 256)]
    return sorted({min(size, max_tokens) for size in sizes})


def _padding(inputs: GraphInputs, block_size: int) -> AttentionBatch:
    """A batch of padding alone, all of it in the null page."""
    num_rows, num_tokens = inputs.num_rows, inputs.num_tokens
    length = num_tokens if inputs.is_prompt else 1
    num_pages = -(-length // block_size)
    return AttentionBatch(
        num_decode_rows=0 if inputs.is_prompt else num_rows,
        query_starts=[0, num_tokens] if inputs.is_prompt else range(num_rows + 1),
        seq_lens=np.full(num_rows, length),
        device_seq_lens=inputs.seq_lens,
        block_table=inputs.slots,
        pages=inputs.pages,
        offsets=inputs.offsets,
        kv_pages=torch.full((num_rows * num_pages,), NULL_PAGE, dtype=torch.int32, device=inputs.slots.device),
        kv_starts=np.arange(0, num_rows * num_pages + 1, num_pages, dtype=np.int32),
        captured_pages=inputs.max_pages,
    )
