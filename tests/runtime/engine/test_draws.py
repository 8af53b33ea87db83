"""Seeded draws of a real model through the whole engine: the same alone, in a crowd, after preemptions, and resumed elsewhere."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_tokens
from model_driver import make_runner

from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.frames import Load, RequestOutput
from runtime.engine.live import EngineRequest
from workers.runner import Runner
from workers.step import ArenaSpec, CopyResult, GroupInfo, SamplingSettings, StepPlan, StepResult

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUM_REQUESTS = 8
MAX_TOKENS = 70
MAX_STEPS = 2000
PAGE_BYTES = 4 * 2 * 2 * 16 * 16 * 4  # KV heads, layers, keys and values, positions, head size, float32


class LocalGroup:
    """One rank in this process. A step runs when it is polled for, so two may be launched ahead."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._plans: deque[StepPlan] = deque()
        self.info = GroupInfo(pids=[], **{**runner.info_fields, "weights_digest": b"weights"})

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def poll(self, timeout_s: float) -> list[StepResult | CopyResult]:
        if not self._plans:
            return []
        plan = self._plans.popleft()
        return [StepResult(plan.sequence, self._runner.execute(plan), 0.0)]

    def wake(self) -> None: ...

    def attach_arena(self, arena: ArenaSpec) -> None: ...

    def close(self) -> None: ...


def sampling_of(number: int) -> SamplingSettings:
    return SamplingSettings(
        temperature=0.7 + 0.1 * number,
        top_k=(0, 20)[number % 2],
        top_p=(1.0, 0.9, 0.95)[number % 3],
        min_p=(0.0, 0.02)[number % 2],
        presence_penalty=(0.0, 0.5)[number % 2],
        frequency_penalty=(0.0, 0.2)[number % 3 == 1],
        repetition_penalty=(1.0, 1.1)[number % 4 == 1],
        seed=(number << 40) + 7,
    )


def request(number: int, output: list[int] | None = None) -> EngineRequest:
    prompt = array("I", random_tokens(20 + 5 * number, number))
    return EngineRequest(0, str(number), prompt, sampling_of(number), MAX_TOKENS, output=array("I", output or []))


def run(folder: Path, requests: list[EngineRequest], **settings: Any) -> tuple[dict[str, list[int]], int]:
    """New tokens by request, and how often one was preempted."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    ended: set[str] = set()

    def sink(outputs: dict[int, list[RequestOutput]], load: Load) -> None:
        for output in outputs.get(0, ()):
            assert output.error is None
            tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                ended.add(output.request_id)

    runner = make_runner(folder, max_model_len=128, **settings)
    engine = Engine(EngineConfig(max_num_batched_tokens=48), LocalGroup(runner), None, sink)
    for entry in requests:
        engine.submit(entry)
    for _ in range(MAX_STEPS):
        engine.step()
        if len(ended) == len(requests):
            break
    assert len(ended) == len(requests)
    assert engine.check() == []
    assert engine.stats().used_pages == 0
    return tokens, engine.stats().num_preemptions


@pytest.fixture(scope="module")
def folder(checkpoints: Any) -> Path:
    path: Path = checkpoints.folder("llama")
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[int]]:
    """Every request in an engine of its own."""
    return {str(number): run(folder, [request(number)])[0][str(number)] for number in range(NUM_REQUESTS)}


def test_draws_in_a_crowd_and_after_preemptions(folder: Path, alone: dict[str, list[int]]) -> None:
    requests = [request(number) for number in range(NUM_REQUESTS)]
    tokens, num_preemptions = run(folder, requests)
    assert (tokens, num_preemptions) == (alone, 0)
    total = 0
    for num_pages in (12, 16, 20):
        tokens, num_preemptions = run(folder, requests[::-1], kv_memory_bytes=num_pages * PAGE_BYTES)
        assert tokens == alone
        total += num_preemptions
    assert total >= 4, total


def test_a_batch_smaller_than_the_engine_would_fill(folder: Path, alone: dict[str, list[int]]) -> None:
    requests = [request(number) for number in range(NUM_REQUESTS)]
    assert run(folder, requests, max_num_seqs=3, max_num_batched_tokens=20) == (alone, 0)


@pytest.mark.parametrize("cut", [1, 13, MAX_TOKENS - 1])
def test_a_resumed_request_continues_its_draws(folder: Path, alone: dict[str, list[int]], cut: int) -> None:
    """On another engine, which is given the output so far; penalties count it as output, not as prompt."""
    resumed = [request(number, alone[str(number)][:cut]) for number in range(NUM_REQUESTS)]
    tokens, _ = run(folder, resumed)
    assert {name: alone[name][:cut] + new for name, new in tokens.items()} == alone


def test_another_seed_draws_otherwise(folder: Path, alone: dict[str, list[int]]) -> None:
    other = replace(request(0), sampling=sampling_of(0)._replace(seed=8))
    assert run(folder, [other])[0]["0"] != alone["0"]
