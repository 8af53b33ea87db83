"""One rank's share of a model: weights, pages and the batch. Runs plans and answers with tokens.

T tokens of a step, S rows that sample, V vocabulary
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cache_store.keys import DTYPE_BYTES
from workers.attention.base import AttentionShape, make_backend
from workers.batch import Batch, StepInput
from workers.config import WorkerConfig
from workers.digest import dummy_digest
from workers.errors import NotEnoughMemory, UnsupportedConfig
from workers.kv.layout import PageLayout, page_layout
from workers.kv.pool import PagePool
from workers.layers.parameter import Placement
from workers.models.build import build_model
from workers.models.config import ModelConfig, load_model_config
from workers.parallel import Communicator
from workers.sampler import all_logprobs, best_logprobs, draw, penalise
from workers.step import ALL_LOGPROBS, RowResult, StepPlan
from workers.weights import Progress

_MAX_PAGES = 1 << 20  # the engine keeps a record per page
_MAX_SCORED_ELEMENTS = 1 << 26  # of prompt logits at once
Logprobs = list[list[tuple[int, float]]] | bytes


class Runner:
    """Built once per group and rank. CheckpointError and NotEnoughMemory come from the constructor."""

    def __init__(self, config: WorkerConfig, comm: Communicator, progress: Progress) -> None:
        model_config = load_model_config(config.model)
        device = comm.device
        dtype = _compute_dtype(config, model_config, device)
        self.max_model_len = _max_model_len(config, model_config)
        self.layout: PageLayout = page_layout(
            model_config,
            block_size=config.block_size,
            dtype=dtype,
            tensor_parallel_size=comm.world_size,
            rank=comm.rank,
        )
        num_pages = _num_pages(config, self.layout, self.max_model_len)
        placement = Placement(comm, getattr(torch, dtype), device)
        self._comm = comm
        self._model = build_model(config, model_config, placement, self.max_model_len, progress)
        self.pool = PagePool(self.layout, num_pages, device)
        shape = attention_shape(model_config, self.layout, comm.world_size)
        self._backend = make_backend(config.attention_backend, shape, self.pool)
        self._batch = Batch(config.max_num_seqs, self.max_model_len, self.layout.block_size, model_config.vocab_size, device)
        self._vocab_size = model_config.vocab_size
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
        }

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[RowResult]:
        """Rows out, rows in, one forward pass, sampling. Every rank samples the same tokens; only rank 0 fills in logprobs. Loads and saves
        are the caller's."""
        step = self._batch.apply(plan)
        if step is None:
            return []
        if len(step.started_pages):
            # A page's earlier tenant may have left NaN or infinity, which a masked weight of 0 would still spread.
            self.pool.tensor.index_fill_(0, step.started_pages, 0)
        self._backend.begin(step.attention)
        hidden_TH = self._model(step.ids, step.positions, self._backend)
        prompt_logprobs = self._score_prompts(step, hidden_TH)
        tokens, logprobs = self._sample(step, hidden_TH)
        rows_of = dict(zip(step.sampled_plan_rows.tolist(), tokens, strict=True))
        return [
            RowResult(row.row_id, [rows_of[index]] if index in rows_of else [], logprobs.get(index), prompt_logprobs.get(index))
            for index, row in enumerate(plan.rows)
        ]

    def close(self) -> None:
        """Frees pages and weights. The communicator belongs to the caller."""
        del self._model, self._backend, self._batch, self.pool

    def _sample(self, step: StepInput, hidden_TH: torch.Tensor) -> tuple[list[int], dict[int, Logprobs]]:
        """New tokens in the order of `sampled_plan_rows`, and logprobs by row of the plan."""
        slots = step.sampled_slots
        if len(slots) == 0:
            return [], {}
        sampling = self._batch.sampling
        logits_SV = self._model.logits(hidden_TH[step.sampled_tokens])
        if sampling.is_plain_greedy(slots):
            tokens_S = logits_SV.argmax(-1)
        else:
            tokens_S = draw(self._penalised(logits_SV, slots), sampling.draws(slots, step.output_positions))
            sampling.count(slots, tokens_S)
        self._batch.last_tokens[torch.from_numpy(slots).to(tokens_S.device)] = tokens_S
        logprobs: dict[int, Logprobs] = {}
        for row, slot in enumerate(slots.tolist()):
            num_best = sampling.settings[slot].num_logprobs
            if num_best is not None and self._comm.rank == 0:
                logprobs[int(step.sampled_plan_rows[row])] = _logprobs(logits_SV[row : row + 1], tokens_S[row : row + 1], num_best)
        return tokens_S.tolist(), logprobs

    def _penalised(self, logits_SV: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        rows = self._batch.sampling.penalised_rows(slots)
        if len(rows) == 0:
            return logits_SV
        index = torch.from_numpy(rows).to(logits_SV.device)
        return logits_SV.index_copy(0, index, penalise(logits_SV[index], self._batch.sampling.penalties(slots[rows])))

    def _score_prompts(self, step: StepInput, hidden_TH: torch.Tensor) -> dict[int, Logprobs]:
        """Prompt logprobs by row of the plan. The head runs on every rank, as it is a collective."""
        scored: dict[int, Logprobs] = {}
        step_tokens = max(1, _MAX_SCORED_ELEMENTS // self._vocab_size)
        for scores in step.prompt_scores:
            pieces: list[Logprobs] = []
            for start in range(0, len(scores.tokens), step_tokens):
                tokens = scores.tokens[start : start + step_tokens]
                logits_TV = self._model.logits(hidden_TH[tokens.start : tokens.stop])
                if self._comm.rank == 0:
                    targets = torch.from_numpy(scores.targets[start : start + step_tokens]).to(logits_TV.device)
                    pieces.append(_logprobs(logits_TV, targets, scores.num_best))
            if pieces:
                scored[scores.plan_row] = b"".join(pieces) if isinstance(pieces[0], bytes) else [row for piece in pieces for row in piece]
        return scored


def _logprobs(logits_SV: torch.Tensor, chosen_S: torch.Tensor, num_best: int) -> Logprobs:
    return all_logprobs(logits_SV) if num_best == ALL_LOGPROBS else best_logprobs(logits_SV, chosen_S, num_best)


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


def _num_pages(config: WorkerConfig, layout: PageLayout, max_model_len: int) -> int:
    """As many pages as the memory holds, with the null page; at least those of one request of the longest context."""
    num_pages = min(config.kv_memory_bytes // layout.page_bytes, _MAX_PAGES)
    needed = -(-max_model_len // layout.block_size) + 1
    if num_pages < needed:
        raise NotEnoughMemory(
            f"--kv-memory of {config.kv_memory_bytes} bytes holds {num_pages} pages, but one request of {max_model_len} tokens needs "
            f"{needed}; give at least {needed * layout.page_bytes} bytes or lower --max-model-len"
        )
    return num_pages
