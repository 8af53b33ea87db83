"""Family x rope x form of config.json x tensor-parallel size x way of reuse, each against transformers.

A family's weights are saved once; its cases differ in config.json. A case is served by a real engine over real ranks and a real store:

    cold     a group of `tp` ranks computes the prompt
    pages    the same group answers the same prompt again
    store    a fresh group of `store_tp` ranks, whose pages are empty, answers it from the store's blocks
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from checkpoints import make_model, random_tokens
from family_cases import FAMILIES, ROPES, SIZES, TP_SIZES, Case, cases

from cache_store.config import StoreConfig
from cache_store.process import StoreProcess
from cache_store.processes import process_identity
from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.frames import EngineStats, Load, RequestOutput
from runtime.engine.live import EngineRequest
from runtime.engine.store_port import RemoteStore
from workers.config import WorkerConfig
from workers.digest import weights_digest
from workers.group import GroupListener, RankGroup
from workers.local import RankPool
from workers.step import ALL_LOGPROBS, SamplingSettings

WAIT_S = 60.0
MAX_DIFFERENCE = 1e-4  # of log-softmax, anywhere
MIN_GAP = 4e-4  # between the oracle's best two log-probabilities, where tokens are compared: twice what two errors could close
BLOCK_SIZE = 8
PROMPT_TOKENS = 61
OUTPUT_TOKENS = 5
REUSED_TOKENS = 56  # full blocks before the last prompt token
SECRET = "matrix"


class Row(NamedTuple):
    """What one answer of one case showed."""

    case: Case
    way: str
    tp: int
    num_cached_tokens: int
    difference: float  # largest of log-softmax
    gap: float  # the oracle's smallest between its best two tokens
    same_tokens: bool

    @property
    def ok(self) -> bool:
        reused = self.num_cached_tokens == (0 if self.way == "cold" else REUSED_TOKENS)
        return reused and self.difference <= MAX_DIFFERENCE and self.gap >= MIN_GAP and self.same_tokens

    def __str__(self) -> str:
        case = f"{self.case.family:23} {self.case.rope:9} {self.case.form:4} {self.tp:3}  {self.way:6}"
        return f"{case} {self.num_cached_tokens:6} {self.difference:10.1e} {self.gap:9.1e}  {'ok' if self.ok else 'FAILED'}"


HEADER = f"{'family':23} {'rope':9} form  tp  way    cached difference oracle gap"


class FamilyCheckpoints:
    """Folders and oracles of cases."""

    def __init__(self, root: Path) -> None:
        import transformers

        transformers.logging.disable_progress_bar()
        self._root = root
        self._weights = functools.cache(self._save_weights)

    def folder(self, case: Case) -> tuple[Path, Any]:
        """A case's checkpoint and its oracle."""
        import transformers

        name = FAMILIES[case.family][0]
        weights = self._weights(case.family)
        config = getattr(transformers, f"{name}Config").from_pretrained(weights)
        config.rope_parameters = self.rope_parameters(case.rope, config)
        oracle = getattr(transformers, f"{name}ForCausalLM").from_pretrained(weights, config=config, experts_implementation="eager").eval()
        folder = self._root / f"{case.family} {case.rope} {case.form}"
        folder.mkdir()
        config.save_pretrained(folder)
        raw = json.loads((folder / "config.json").read_text()) | {"architectures": [f"{name}ForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(as_version_4(raw) if case.form == 4 else raw))
        for file in weights.glob("model*"):
            os.link(file, folder / file.name)
        return folder, oracle

    def rope_parameters(self, rope: str, config: Any) -> dict[str, Any]:
        parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
        if rope == "longrope":
            num_pairs = (getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None) or 8) // 2
            parameters |= {"short_factor": [1.0 + pair / 8 for pair in range(num_pairs)], "long_factor": [3.0] * num_pairs}
        return parameters

    def _save_weights(self, family: str) -> Path:
        """Every other family in several files with an index."""
        name, settings = FAMILIES[family]
        folder = self._root / family
        is_sharded = list(FAMILIES).index(family) % 2 == 1
        make_model(name, {**SIZES, **settings}).save_pretrained(folder, max_shard_size="150KB" if is_sharded else "1GB")
        assert (folder / "model.safetensors.index.json").exists() == is_sharded
        return folder


def as_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"rope_type" if kind == "llama3" else "type": kind, **rope}
    old["torch_dtype"] = old.pop("dtype", "float32")
    return old


class Answer(NamedTuple):
    token_ids: list[int]
    scores: np.ndarray  # [scored positions, vocabulary] log-softmax; the last OUTPUT_TOKENS score the output
    num_cached_tokens: int


class RunningEngine:
    """An engine on its own thread over a loaded group; the group and the port are the caller's. With-able."""

    def __init__(self, group: RankGroup, port: RemoteStore, digest: bytes) -> None:
        self._news = threading.Condition()
        self._outputs: list[RequestOutput] = []
        self._num_asked = 0
        config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=48, idle_poll_s=0.02)  # a prompt takes two steps
        self._engine = Engine(config, group, port, self._hear, digest=lambda: digest, processes=(process_identity(os.getpid()),))
        self._thread = threading.Thread(target=self._engine.run, name="engine")
        self._thread.start()

    def __enter__(self) -> RunningEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def _hear(self, outputs: dict[int, list[RequestOutput]], _load: Load) -> None:
        with self._news:
            self._outputs += [output for batch in outputs.values() for output in batch]
            self._news.notify_all()

    def answer(self, prompt: list[int], first_scored: int) -> Answer:
        """Greedy tokens, with the log-softmax of every prompt position from `first_scored` on and of every output."""
        self._num_asked += 1
        sampling = SamplingSettings(
            temperature=0.0, num_logprobs=ALL_LOGPROBS, num_prompt_logprobs=ALL_LOGPROBS, prompt_logprobs_start=first_scored
        )
        self._engine.submit(EngineRequest(0, str(self._num_asked), array("I", prompt), sampling, OUTPUT_TOKENS))
        with self._news:
            assert self._news.wait_for(lambda: any(each.finish_reason or each.error for each in self._outputs), WAIT_S)
            outputs, self._outputs = self._outputs, []
        assert outputs[-1].error is None, outputs[-1].error
        pieces = [piece for each in outputs for piece in (each.prompt_logprobs, each.logprobs) if isinstance(piece, bytes)]
        scores = np.frombuffer(b"".join(pieces), "<f4")
        cached = next(each.cached for each in outputs if each.cached is not None)
        tokens = [token for each in outputs for token in each.token_ids]
        return Answer(tokens, scores.reshape(len(prompt) - first_scored + OUTPUT_TOKENS - (first_scored == 0), -1), sum(cached))

    def wait(self, condition: Callable[[EngineStats], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition(self._engine.stats()):
            assert time.monotonic() < deadline_s, self._engine.stats()
            time.sleep(0.005)


class Matrix:
    """One pool of rank processes and one store, for all cases. With-able."""

    def __init__(self, root: Path) -> None:
        self.checkpoints = FamilyCheckpoints(root)
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(RankPool(max(TP_SIZES), env={"PYTHONPATH": str(Path(__file__).resolve().parents[1])}))
        store = self._stack.enter_context(StoreProcess(StoreConfig(memory_bytes=64 << 20, extent_bytes=1 << 20, secret=SECRET)))
        self._store_address = store.start(WAIT_S)
        self._group: tuple[int, RankGroup] | None = None
        self._prepare = functools.cache(self._prepare_case)

    def __enter__(self) -> Matrix:
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            self._group[1].close()
        self._stack.close()

    def run(self) -> Iterator[Row]:
        """All cases cold and from pages, then those that are answered from the store; by number of ranks, so that groups change rarely."""
        for case in sorted(cases(), key=lambda case: case.tp):
            yield from self._compute(case)
        for case in sorted((case for case in cases() if case.store_tp), key=lambda case: -(case.store_tp or 0)):
            yield from self._load(case)

    def _compute(self, case: Case) -> Iterator[Row]:
        folder, oracle, prompt = self._prepare(case)
        with self._serving(folder, case.tp) as running:
            yield compare(case, "cold", case.tp, oracle, prompt, running.answer(prompt, 0))
            yield compare(case, "pages", case.tp, oracle, prompt, running.answer(prompt, PROMPT_TOKENS - 1))
            running.wait(lambda stats: stats.blocks_pending_offer == 0 and stats.leased_slots == 0)

    def _load(self, case: Case) -> Iterator[Row]:
        assert case.store_tp
        folder, oracle, prompt = self._prepare(case)
        with self._serving(folder, case.store_tp) as running:
            yield compare(case, "store", case.store_tp, oracle, prompt, running.answer(prompt, PROMPT_TOKENS - 1))

    def _prepare_case(self, case: Case) -> tuple[Path, Any, list[int]]:
        folder, oracle = self.checkpoints.folder(case)
        return folder, oracle, prompt_for(oracle, 100 * list(FAMILIES).index(case.family))

    @contextmanager
    def _serving(self, folder: Path, tp: int) -> Iterator[RunningEngine]:
        """A freshly loaded model on `tp` ranks: its pages are empty."""
        group = self._ranks(tp)
        group.load(
            WorkerConfig(str(folder), tp, block_size=BLOCK_SIZE, kv_memory_bytes=4 << 20, max_num_seqs=4, max_model_len=128, device="cpu"),
            lambda *_: None,
            WAIT_S,
        )
        with RemoteStore(self._store_address, SECRET, "matrix") as port, RunningEngine(group, port, weights_digest(folder)) as running:
            running.wait(lambda stats: stats.store_state == "ready")
            yield running

    def _ranks(self, tp: int) -> RankGroup:
        """The pool's processes serve one group at a time; another size ends the one before."""
        if self._group is not None and self._group[0] != tp:
            self._group[1].close()
            self._group = None
        if self._group is None:
            with GroupListener(tp, secret=SECRET) as listener:
                self._pool.serve(listener.address, tp, SECRET)
                self._group = (tp, listener.accept(WAIT_S, self._pool.check))
        return self._group[1]


def prompt_for(oracle: Any, seed: int) -> list[int]:
    """The first prompt from `seed` on where the oracle's greedy output is never a matter of rounding."""
    for number in itertools.count(seed):
        prompt = random_tokens(PROMPT_TOKENS, number)
        tokens = list(prompt)
        with torch.no_grad():
            while len(tokens) < PROMPT_TOKENS + OUTPUT_TOKENS:
                scores = oracle(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
                best = scores.topk(2).values
                if best[0] - best[1] < 2 * MIN_GAP:
                    break
                tokens.append(int(scores.argmax()))
            else:
                return prompt
    raise AssertionError("there are more numbers")


def compare(case: Case, way: str, tp: int, oracle: Any, prompt: list[int], answer: Answer) -> Row:
    """One forward pass of the oracle over prompt and output: where its best token is ours at every place, its greedy output is ours."""
    with torch.no_grad():
        scores = np.asarray(oracle(torch.tensor([prompt + answer.token_ids])).logits[0].log_softmax(-1))[:-1]
    outputs = scores[PROMPT_TOKENS - 1 :]
    best = np.sort(outputs, axis=1)
    gap = float((best[:, -1] - best[:, -2]).min())
    difference = float(np.abs(answer.scores - scores[-len(answer.scores) :]).max())
    return Row(case, way, tp, answer.num_cached_tokens, difference, gap, outputs.argmax(1).tolist() == answer.token_ids)
