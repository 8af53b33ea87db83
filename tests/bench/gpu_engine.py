"""One engine over one real rank process, driven in this process: what the GPU benchmarks measure."""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine, EngineRequest
from runtime.engine.frames import Load, RequestOutput
from runtime.engine.store_port import StorePort
from workers.config import WorkerConfig
from workers.group import GroupListener
from workers.local import spawn_ranks
from workers.step import SamplingSettings

LOAD_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 300.0


@dataclass
class Answer:
    """One request's way, in seconds of time.perf_counter()."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    cached: list[int] | None = None
    error: list[str] | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def ttft_ms(self) -> float:
        return (self.token_times_s[0] - self.sent_s) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1e3 for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


class GpuEngine:
    """`generate` sends requests together and waits for all of them."""

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.engine: Engine
        self._answers: dict[str, Answer] = {}
        self._num_requests = 0

    def deliver(self, outputs: dict[int, list[RequestOutput]], load: Load) -> None:
        now_s = time.perf_counter()
        for output in (each for batch in outputs.values() for each in batch):
            answer = self._answers[output.request_id]
            answer.cached = output.cached or answer.cached
            answer.token_times_s += [now_s] * len(output.token_ids)
            answer.token_ids += output.token_ids
            answer.error = output.error
            if output.finish_reason is not None or output.error is not None:
                answer.done.set()

    def send(self, prompt: Sequence[int], num_tokens: int, sampling: SamplingSettings | None = None) -> Answer:
        self._num_requests += 1
        name = str(self._num_requests)
        answer = self._answers[name] = Answer(time.perf_counter())
        settings = sampling or SamplingSettings(temperature=0.0)
        self.engine.submit(EngineRequest(0, name, array("I", prompt), settings, num_tokens))
        return answer

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[float, list[Answer]]:
        """Seconds for all, and the answers."""
        began_s = time.perf_counter()
        answers = [self.send(prompt, num_tokens) for prompt in prompts]
        for answer in answers:
            if not answer.done.wait(REQUEST_TIMEOUT_S) or answer.error:
                raise RuntimeError(f"a request failed: {answer.error or 'no answer'}")
        return time.perf_counter() - began_s, answers


@contextlib.contextmanager
def gpu_engine(worker: WorkerConfig, config: EngineConfig, store: StorePort | None = None) -> Iterator[GpuEngine]:
    began_s = time.perf_counter()
    secret = secrets.token_hex(8)
    with GroupListener(1, secret=secret) as listener, spawn_ranks(listener.address, 1, secret) as ranks:
        with listener.accept(120.0, ranks.check) as group:
            group.load(worker, _show, LOAD_TIMEOUT_S)
            running = GpuEngine(time.perf_counter() - began_s)
            running.engine = Engine(config, group, store, running.deliver)
            thread = threading.Thread(target=running.engine.run, name="engine")
            thread.start()
            try:
                yield running
            finally:
                running.engine.stop()
                thread.join(30.0)


_shown: dict[str, float] = {}


def _show(rank: int, phase: str, done: int, total: int) -> None:
    """The beginning and the end of each phase, with the time."""
    if done in (0, total):
        _shown.setdefault(phase, time.perf_counter())
        print(f"  {phase} {done}/{total} at {time.perf_counter() - _shown[phase]:.1f} s", file=sys.stderr, flush=True)


def dummy_worker(folder: Path, **settings: object) -> WorkerConfig:
    return WorkerConfig(str(folder), load_format="dummy", device="cuda", **settings)  # type: ignore[arg-type]
