"""Drives a Runner without an engine: hands out pages, plans chunks and decode steps, collects what comes back."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workers.config import WorkerConfig
from workers.layers.parameter import Placement
from workers.models import MODELS
from workers.models.config import load_model_config
from workers.models.decoder import DecoderModel
from workers.parallel import Communicator
from workers.runner import Runner
from workers.step import NewRow, RowResult, SamplingSettings, StepPlan, StepRow
from workers.weights import wanted_parts

GREEDY = SamplingSettings(temperature=0.0)


def make_runner(folder: Path, comm: Communicator | None = None, **settings: Any) -> Runner:
    """A runner with small pages and little memory."""
    config = WorkerConfig(str(folder), **{"block_size": 16, "kv_memory_bytes": 8 << 20, "max_num_seqs": 16, **settings})
    return Runner(config, comm or Communicator.single("cpu"), lambda phase, done, total: None)


def build_rank(folder: Path, rank: int, world_size: int) -> DecoderModel:
    """A rank's model by itself, without weights: building and loading need no other rank."""
    cpu = torch.device("cpu")
    placement = Placement(Communicator(rank, world_size, cpu, None), torch.float32, cpu)
    config = load_model_config(folder)
    module, family = MODELS[config.architecture].implementation.split(":")
    return getattr(importlib.import_module(module), family)(config, placement, 64)


def gather_tensors(models: Sequence[DecoderModel]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors put together from the ranks' slices; what no rank has stays NaN."""
    tensors: dict[str, torch.Tensor] = {}
    for model in models:
        for name, part, parameter in wanted_parts(model):
            whole = tensors.setdefault(name, torch.full(part.shape, float("nan")))
            whole[part.source] = parameter.data[part.target].float()
    return tensors


class Driver:
    """A naive engine over one runner. Pages are handed out in a scattered order and come back when a row is removed."""

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        self.runner = runner
        self.block_size: int = runner.info_fields["block_size"]
        self._free = list(np.random.RandomState(seed).permutation(np.arange(1, runner.info_fields["num_pages"])))
        self.pages: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}  # computed tokens
        self.known: dict[int, list[int]] = {}
        self.prompt_logprobs: dict[int, list[Any]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self._rows_in: list[NewRow] = []
        self._rows_out: list[int] = []
        self._new_pages: dict[int, list[int]] = {}
        self._sequence = 0

    def add(
        self,
        row_id: int,
        prompt: Sequence[int],
        sampling: SamplingSettings = GREEDY,
        *,
        outputs: Sequence[int] = (),
        cached: tuple[Sequence[int], int] = ((), 0),
    ) -> None:
        """`cached`: pages that hold the first tokens already, and how many."""
        pages, num_computed = list(cached[0]), cached[1]
        self.known[row_id] = [*prompt, *outputs]
        self.pages[row_id] = pages
        self.lengths[row_id] = num_computed
        self.prompt_logprobs[row_id], self.logprobs[row_id] = [], []
        tokens = np.array(self.known[row_id], "<u4").tobytes()
        self._rows_in.append(NewRow(row_id, tokens, len(prompt), num_computed, list(pages), sampling))

    def remove(self, row_id: int) -> None:
        self._rows_out.append(row_id)
        self._free += self.pages.pop(row_id)

    def step(self, work: dict[int, int]) -> list[RowResult]:
        """Runs one step; `work` is query tokens by row."""
        rows = []
        for row_id, num_tokens in work.items():
            self.lengths[row_id] += num_tokens
            missing = -(-self.lengths[row_id] // self.block_size) - len(self.pages[row_id])
            new_pages = [int(self._free.pop()) for _ in range(missing)]
            self.pages[row_id] += new_pages
            rows.append(StepRow(row_id, num_tokens, 0, 0, new_pages))
        self._sequence += 1
        results = self.runner.execute(StepPlan(self._sequence, self._rows_out, self._rows_in, rows, [], []))
        self._rows_in, self._rows_out = [], []
        assert [result.row_id for result in results] == list(work)
        for result in results:
            self.known[result.row_id] += result.token_ids
            if result.prompt_logprobs is not None:
                self.prompt_logprobs[result.row_id].append(result.prompt_logprobs)
            if result.logprobs is not None:
                self.logprobs[result.row_id].append(result.logprobs)
        return results

    def prefill(self, row_ids: Sequence[int], chunk: int | None = None) -> None:
        """Computes everything known of the rows, in chunks; the last one samples."""
        while work := {r: min(chunk or 1 << 30, len(self.known[r]) - self.lengths[r]) for r in row_ids if not self._is_done(r)}:
            before = {r: len(self.known[r]) for r in work}
            self.step(work)
            row_ids = [r for r in row_ids if r not in work or len(self.known[r]) == before[r]]

    def _is_done(self, row_id: int) -> bool:
        return self.lengths[row_id] >= len(self.known[row_id])

    def decode(self, row_ids: Sequence[int], num_steps: int) -> None:
        for _ in range(num_steps):
            self.step(dict.fromkeys(row_ids, 1))

    def scores(self, row_id: int) -> np.ndarray:
        """Log-softmax of every scored position, [positions, vocabulary], of a row that asked for all logprobs."""
        pieces = [*self.prompt_logprobs[row_id], *self.logprobs[row_id]]
        return np.frombuffer(b"".join(pieces), "<f4").reshape(-1, self.runner.info_fields["vocab_size"])
