"""One rank's share of a model: weights, pages and the batch. Runs plans and answers with tokens.

    launch    deltas -> layout -> forward pass -> sampling, all queued on the device        the next plan may be launched behind it
    collect   waits for the step's tokens, and makes rows of them

T tokens of a step, S rows that sample, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from cache_store.keys import DTYPE_BYTES
from workers.attention.base import AttentionShape, make_backend
from workers.batch import Batch, StepInput, to_device
from workers.config import WorkerConfig
from workers.digest import dummy_digest
from workers.errors import NotEnoughMemory, UnsupportedConfig
from workers.kv.gates import LayerGates
from workers.kv.layout import PageLayout, page_layout
from workers.kv.pool import PagePool
from workers.layers.parameter import Placement
from workers.models.build import build_model
from workers.models.config import ModelConfig, load_model_config
from workers.parallel import Communicator
from workers.sampler import all_logprobs, best_logprobs, draw, penalise
from workers.step import ALL_LOGPROBS, RowResult, StepPlan
from workers.warm_up import first_plans
from workers.weights import Progress

_MAX_PAGES = 1 << 20  # the engine keeps a record per page
_CPU_KV_BYTES = 1 << 30
_CPU_BATCHED_TOKENS = 2048
_CUDA_BATCHED_TOKENS = 8192
_PROMPT_TOKENS_BESIDE_OUTPUTS = 768  # twice as many for experts: all their weights are read for a step, a part of them is used by a token
_MAX_PIECE_TOKENS = 2048  # a longer step keeps the device busy for longer than the host needs to launch it without graphs
_MAX_SCORED_ELEMENTS = 1 << 26  # of prompt logits at once
Logprobs = list[list[tuple[int, float]]] | bytes
BeforeForward = Callable[[bool], None]  # told whether the pass waits for pages on their way at `Runner.gates`, if any


class LaunchedStep(NamedTuple):
    """A step on its way. Tokens and logprobs are read once the event, if any, has come."""

    row_ids: list[int]
    sampled_rows: list[int]  # rows of the plan that sample
    tokens: torch.Tensor  # [S] int64 on the host
    event: Any  # torch.cuda.Event; None on the CPU
    logprobs: dict[int, Callable[[], Logprobs]]  # by row of the plan
    prompt_logprobs: dict[int, Callable[[], Logprobs]]


class Runner:
    """Built once per group and rank. CheckpointError and NotEnoughMemory come from the constructor."""

    def __init__(self, config: WorkerConfig, comm: Communicator, progress: Progress) -> None:
        model_config = load_model_config(config.model)
        device = comm.device
        dtype = _compute_dtype(config, model_config, device)
        self.max_model_len = _max_model_len(config, model_config)
        max_num_batched_tokens = max_batched_tokens(config, device)
        self.layout: PageLayout = page_layout(
            model_config,
            block_size=config.block_size,
            dtype=dtype,
            tensor_parallel_size=comm.world_size,
            rank=comm.rank,
        )
        side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        placement = Placement(comm, getattr(torch, dtype), device, side_stream)
        self._comm = comm
        self._vocab_size = model_config.vocab_size
        self._model = build_model(config, model_config, placement, self.max_model_len, progress)
        self.pool = PagePool(self.layout, _num_pages(config, self.layout, self.max_model_len, device), device)
        num_pages = self.pool.num_pages
        shape = attention_shape(model_config, self.layout, comm.world_size)
        self._backend = make_backend(config.attention_backend, shape, self.pool)
        self._backend.build(progress)
        if device.type == "cuda":
            self._backend.gates = LayerGates([run.first_layer for run in self.layout.load_runs], device)
        self._batch = Batch(
            config.max_num_seqs,
            self.max_model_len,
            self.layout.block_size,
            model_config.vocab_size,
            device,
            has_block_table=self._backend.reads_block_table,
        )
        self._graphs: StepGraphs | None = None
        self._pieces: PieceGraphs | None = None
        if device.type == "cuda" and self._backend.has_graphs and config.cuda_graphs:
            from workers.graphs import PieceGraphs, StepGraphs

            with torch.inference_mode():
                max_piece_tokens = min(max_num_batched_tokens, _MAX_PIECE_TOKENS)
                self._pieces = PieceGraphs(self._model, self._backend, max_piece_tokens, device, progress)
                self._graphs = StepGraphs(self._model, self._backend, self._batch, config.max_num_seqs, max_num_batched_tokens, progress)
        if self.is_asynchronous:
            limits = config.max_num_seqs, max_num_batched_tokens, self.max_model_len
            plans = list(first_plans(*limits, self.layout.block_size, _MAX_PIECE_TOKENS + 1))
            for number, plan in enumerate(plans):
                progress("first steps", number, len(plans))
                self.execute(plan)
            progress("first steps", len(plans), len(plans))
        digest_input = model_config.block_digest_input()
        self.info_fields: dict[str, Any] = {  # of GroupInfo, all but pids
            "num_pages": num_pages,
            "block_size": self.layout.block_size,
            "max_model_len": self.max_model_len,
            "vocab_size": model_config.vocab_size,
            "layout": self.layout.store,
            "model_config": digest_input,
            "weights_digest": dummy_digest(digest_input, config.seed) if config.load_format == "dummy" else None,
            "compute_dtype": dtype,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_prompt_tokens_beside_outputs": _PROMPT_TOKENS_BESIDE_OUTPUTS * (2 if model_config.moe else 1),
        }

    @property
    def is_asynchronous(self) -> bool:
        return self.pool.tensor.is_cuda

    @property
    def gates(self) -> LayerGates | None:
        return self._backend.gates

    def execute(self, plan: StepPlan) -> list[RowResult]:
        """Launches a step and collects it."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan, before_forward: BeforeForward = lambda has_gates: None) -> LaunchedStep:
        """Rows out, rows in, one forward pass, sampling. Every rank samples the same tokens; only rank 0 fills in logprobs. Loads and saves
        are the caller's. On CUDA it returns before the device is done. `before_forward` is called when all is ready for the pass."""
        row_ids = [row.row_id for row in plan.rows]
        step = self._batch.apply(plan)
        if step is None:
            before_forward(False)
            return LaunchedStep(row_ids, [], torch.empty(0, dtype=torch.int64), None, {}, {})
        logits_SV, prompt_logprobs = self._forward(step, lambda: before_forward(step.attention.has_gates))
        tokens_S, logprobs = self._sample(step, logits_SV)
        event = None
        if self.is_asynchronous:  # also without a token: an answer means that the device is done with pages and staging memory
            tokens_S = torch.empty(tokens_S.shape, dtype=tokens_S.dtype, pin_memory=True).copy_(tokens_S, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return LaunchedStep(row_ids, step.sampled_plan_rows.tolist(), tokens_S, event, logprobs, prompt_logprobs)

    @torch.inference_mode()
    def collect(self, launched: LaunchedStep) -> list[RowResult]:
        """Waits for the device. May be called on another thread than `launch`, in the order of the launches."""
        if launched.event is not None:
            launched.event.synchronize()
        row_ids, sampled_rows, tokens, _, logprobs, prompt_logprobs = launched
        rows_of = dict(zip(sampled_rows, tokens.tolist(), strict=True))
        if not (logprobs or prompt_logprobs) and len(sampled_rows) == len(row_ids):
            return [RowResult(row_id, [rows_of[index]]) for index, row_id in enumerate(row_ids)]
        return [
            RowResult(
                row_id,
                [rows_of[index]] if index in rows_of else [],
                logprobs[index]() if index in logprobs else None,
                prompt_logprobs[index]() if index in prompt_logprobs else None,
            )
            for index, row_id in enumerate(row_ids)
        ]

    def close(self) -> None:
        """Frees pages and weights. The communicator belongs to the caller."""
        del self._model, self._backend, self._batch, self.pool

    def _forward(self, step: StepInput, before: Callable[[], None]) -> tuple[torch.Tensor, dict[int, Callable[[], Logprobs]]]:
        """Logits [S, V] of the rows that sample, and prompt logprobs."""
        if step.graph is not None:
            assert self._graphs
            return self._graphs.replay(step.attention, len(step.sampled_slots), before), {}
        if len(step.started_pages) and self._backend.reads_behind_end:
            # A page's earlier tenant may have left NaN or infinity, which a masked weight of 0 would still spread.
            self.pool.tensor.index_fill_(0, step.started_pages, 0)
        self._backend.begin(step.attention)
        before()
        hidden_TH = self._pieces.run(step.ids, step.positions, step.attention) if self._pieces is not None else None
        if hidden_TH is None:
            hidden_TH = self._model(step.ids, step.positions, self._backend)
        prompt_logprobs = self._score_prompts(step, hidden_TH)
        if len(step.sampled_slots) == 0:
            return hidden_TH.new_empty((0, self._vocab_size)), prompt_logprobs
        return self._model.logits(hidden_TH[step.sampled_tokens]), prompt_logprobs

    def _sample(self, step: StepInput, logits_SV: torch.Tensor) -> tuple[torch.Tensor, dict[int, Callable[[], Logprobs]]]:
        """New tokens [S] in the order of `sampled_plan_rows`, and logprobs by row of the plan."""
        slots = step.sampled_slots
        if len(slots) == 0:
            return torch.empty(0, dtype=torch.int64), {}
        sampling = self._batch.sampling
        if sampling.is_plain_greedy(slots):
            tokens_S = logits_SV.argmax(-1)
        else:
            tokens_S = draw(self._penalised(logits_SV, slots), sampling.draws(slots, step.output_positions))
            sampling.count(slots, tokens_S)
        self._batch.last_tokens[step.sampled_device_slots] = tokens_S
        logprobs: dict[int, Callable[[], Logprobs]] = {}
        for row, slot in enumerate(slots.tolist()):
            num_best = sampling.settings[slot].num_logprobs
            if num_best is not None and self._comm.rank == 0:
                scored = _logprobs(logits_SV[row : row + 1], tokens_S[row : row + 1], num_best)
                logprobs[int(step.sampled_plan_rows[row])] = scored
        return tokens_S, logprobs

    def _penalised(self, logits_SV: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        rows = self._batch.sampling.penalised_rows(slots)
        if len(rows) == 0:
            return logits_SV
        index = to_device(rows, logits_SV.device)
        return logits_SV.index_copy(0, index, penalise(logits_SV[index], self._batch.sampling.penalties(slots[rows])))

    def _score_prompts(self, step: StepInput, hidden_TH: torch.Tensor) -> dict[int, Callable[[], Logprobs]]:
        """Prompt logprobs by row of the plan. The head runs on every rank, as it is a collective."""
        scored: dict[int, Callable[[], Logprobs]] = {}
        step_tokens = max(1, _MAX_SCORED_ELEMENTS // self._vocab_size)
        for scores in step.prompt_scores:
            pieces: list[Callable[[], Logprobs]] = []
            for start in range(0, len(scores.tokens), step_tokens):
                tokens = scores.tokens[start : start + step_tokens]
                logits_TV = self._model.logits(hidden_TH[tokens.start : tokens.stop])
                if self._comm.rank == 0:
                    targets = to_device(scores.targets[start : start + step_tokens], logits_TV.device)
                    pieces.append(_logprobs(logits_TV, targets, scores.num_best))
            if pieces:
                scored[scores.plan_row] = _joined(pieces)
        return scored


def _logprobs(logits_SV: torch.Tensor, chosen_S: torch.Tensor, num_best: int) -> Callable[[], Logprobs]:
    """What reads the logprobs of some positions, once the device has them."""
    return all_logprobs(logits_SV) if num_best == ALL_LOGPROBS else best_logprobs(logits_SV, chosen_S, num_best)


def _joined(pieces: list[Callable[[], Logprobs]]) -> Callable[[], Logprobs]:
    def read() -> Logprobs:
        parts = [piece() for piece in pieces]
        return b"".join(parts) if isinstance(parts[0], bytes) else [row for part in parts for row in part]

    return read


def attention_shape(config: ModelConfig, layout: PageLayout, tensor_parallel_size: int) -> AttentionShape:
    """What attention on the layout's rank looks like."""
    num_heads, group_size = config.num_heads // tensor_parallel_size, 0 if config.mla else config.num_heads // config.num_kv_heads
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=1 if config.mla else layout.num_parts,
        head_dim=config.head_dim,
        scale=config.softmax_scale,
        latent_dim=config.mla.kv_lora_rank if config.mla else 0,
        window=config.window,
        group_size=group_size,
        first_query=layout.rank * num_heads % group_size if group_size else 0,
    )


def _compute_dtype(config: WorkerConfig, model_config: ModelConfig, device: torch.device) -> str:
    if config.dtype == "auto":
        return model_config.dtype if device.type == "cuda" else "float32"
    if config.dtype not in DTYPE_BYTES:
        raise UnsupportedConfig(f"--dtype {config.dtype!r} is unknown; known: auto, {', '.join(DTYPE_BYTES)}")
    return config.dtype


def _max_model_len(config: WorkerConfig, model_config: ModelConfig) -> int:
    if config.max_model_len is None:
        return model_config.max_model_len
    if not 1 <= config.max_model_len <= model_config.max_model_len:
        raise UnsupportedConfig(f"--max-model-len {config.max_model_len} is not within 1 and the model's {model_config.max_model_len}")
    return config.max_model_len


def max_batched_tokens(config: WorkerConfig, device: torch.device) -> int:
    """The most tokens of one step, as told or by device."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    return _CUDA_BATCHED_TOKENS if device.type == "cuda" else _CPU_BATCHED_TOKENS


def _num_pages(config: WorkerConfig, layout: PageLayout, max_model_len: int, device: torch.device) -> int:
    """As many pages as the memory holds, with the null page; at least those of one request of the longest context."""
    memory_bytes = config.kv_memory_bytes or _default_kv_memory(config, device)
    num_pages = min(memory_bytes // layout.page_bytes, _MAX_PAGES)
    needed = -(-max_model_len // layout.block_size) + 1
    if num_pages < needed:
        raise NotEnoughMemory(
            f"--kv-memory of {memory_bytes} bytes holds {num_pages} pages, but one request of {max_model_len} tokens needs "
            f"{needed}; give at least {needed * layout.page_bytes} bytes or lower --max-model-len"
        )
    return num_pages


def _default_kv_memory(config: WorkerConfig, device: torch.device) -> int:
    """On the CPU a fixed amount; on CUDA what the weights have left of the card, but for a share that forward passes work in."""
    if device.type != "cuda":
        return _CPU_KV_BYTES
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return max(0, free_bytes - int(total_bytes * (1 - config.gpu_memory_utilization)))
