"""One engine over real rank processes, driven in this process: our side of the GPU benchmarks."""

from __future__ import annotations

import contextlib
import itertools
import queue
import secrets
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_store.config import StoreConfig
from cache_store.keys import Layout, hash_fields
from cache_store.process import StoreProcess
from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine, EngineRequest
from runtime.engine.frames import Load, RequestOutput
from runtime.engine.store_port import RemoteStore, StoreState
from tests.bench.gpu_shapes import MAX_MODEL_LEN
from tests.bench.gpu_workloads import POOL_TOKENS, Answer, Prompt
from workers.config import WorkerConfig
from workers.group import GroupListener, RankGroup
from workers.kv.layout import page_layout
from workers.local import spawn_ranks
from workers.models.config import load_model_config
from workers.step import SamplingSettings, WorkerGroup

DEVICE = "cuda"
LOAD_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 300.0
SETTLE_TIMEOUT_S = 30.0
STORE_BYTES = 16 << 30
STORE_START_TIMEOUT_S = 60.0


@dataclass
class PendingAnswer(Answer):
    token_ids: list[int] = field(default_factory=list)
    error: list[str] | None = None
    done: threading.Event = field(default_factory=threading.Event)


class LateStore(RemoteStore):
    """The port to a store that the engine hears of only after `attach`."""

    def __init__(self, address: str, secret: str) -> None:
        super().__init__(address, secret, "bench")
        self._starts: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def start(self, layout: Layout, processes: Sequence[tuple[int, int]], wake: Callable[[], None]) -> None:
        self._starts.put(lambda: RemoteStore.start(self, layout, processes, wake))

    def attach(self) -> None:
        self._starts.get(timeout=SETTLE_TIMEOUT_S)()


Watch = tuple[Callable[[RankGroup], WorkerGroup], Callable[[str, str], LateStore]]


class GpuEngine:
    """A System. `engine` is there once the group has loaded."""

    def __init__(self, port: LateStore | None) -> None:
        self.engine: Engine
        self._port = port
        self._is_attached = False
        self._answers: dict[str, PendingAnswer] = {}
        self._num_requests = 0

    @property
    def settings(self) -> dict[str, Any]:
        info, limits = self.engine.info, self.engine.limits
        return {"num_pages": info.num_pages, "block_size": info.block_size, "max_num_batched_tokens": limits.max_num_batched_tokens}

    def deliver(self, outputs: dict[int, list[RequestOutput]], load: Load) -> None:
        now_s = time.perf_counter()
        for output in (each for batch in outputs.values() for each in batch):
            answer = self._answers[output.request_id]
            if output.cached is not None:
                answer.num_cached = sum(output.cached)
            answer.token_times_s += [now_s] * len(output.token_ids)
            answer.token_ids += output.token_ids
            answer.error = output.error
            if output.finish_reason is not None or output.error is not None:
                answer.done.set()

    def send(self, prompt: Prompt, num_tokens: int) -> PendingAnswer:
        self._num_requests += 1
        name = str(self._num_requests)
        answer = self._answers[name] = PendingAnswer(time.perf_counter())
        self.engine.submit(EngineRequest(0, name, array("I", prompt), SamplingSettings(temperature=0.0), num_tokens))
        return answer

    def generate(
        self, prompts: Sequence[Prompt], num_tokens: int, *, streamed: bool = False, delays_s: Sequence[float] = ()
    ) -> tuple[float, list[PendingAnswer]]:
        """Tokens come as they are made, `streamed` or not. RuntimeError when a request fails."""
        began_s = time.perf_counter()
        answers = []
        for prompt, delay_s in itertools.zip_longest(prompts, delays_s, fillvalue=0.0):
            time.sleep(max(0.0, began_s + delay_s - time.perf_counter()))
            answers.append(self.send(prompt, num_tokens))
        for answer in answers:
            if not answer.done.wait(REQUEST_TIMEOUT_S) or answer.error or len(answer.token_ids) != num_tokens:
                raise RuntimeError(f"a request failed after {len(answer.token_ids)} tokens: {answer.error or 'no end'}")
        seconds = time.perf_counter() - began_s
        self._answers.clear()
        return seconds, answers

    def attach_store(self) -> None:
        if self._port is not None and not self._is_attached:
            self._port.attach()
            _await(lambda: self.engine.stats().store_state == StoreState.READY)
            self._is_attached = True
            self.settle()  # what pages hold already is offered now

    def settle(self) -> None:
        if self._is_attached:
            _await(lambda: not self.engine.stats().blocks_pending_offer)


def _await(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError("the engine does not settle")
        time.sleep(0.01)


@contextlib.contextmanager
def serving(folder: Path, load_format: str, tensor_parallel_size: int = 1) -> Iterator[GpuEngine]:
    """With as many pages as the card holds, and no store."""
    worker = WorkerConfig(str(folder), tensor_parallel_size, load_format=load_format, device=DEVICE, max_model_len=MAX_MODEL_LEN)
    with _running(worker, None) as system:
        yield system


@contextlib.contextmanager
def storing(folder: Path, load_format: str, tensor_parallel_size: int = 1, watch: Watch | None = None) -> Iterator[GpuEngine]:
    """With pages for POOL_TOKENS, and a store that `attach_store` makes known. `watch`: wraps the group, and makes the port."""
    config = load_model_config(folder)
    layout = page_layout(config, block_size=None, dtype=config.dtype, tensor_parallel_size=tensor_parallel_size, rank=0)
    pool_bytes = POOL_TOKENS // layout.block_size * layout.page_bytes
    worker = WorkerConfig(
        str(folder), tensor_parallel_size, load_format=load_format, device=DEVICE, max_model_len=MAX_MODEL_LEN, kv_memory_bytes=pool_bytes
    )
    secret = secrets.token_hex(8)
    with StoreProcess(StoreConfig(memory_bytes=STORE_BYTES, secret=secret)) as store:
        address = store.start(STORE_START_TIMEOUT_S)
        wrap_group, make_port = watch or (lambda group: group, LateStore)
        port = make_port(address, secret)
        with port, _running(worker, port, wrap_group) as system:
            yield system


@contextlib.contextmanager
def _running(
    worker: WorkerConfig, port: LateStore | None, wrap: Callable[[RankGroup], WorkerGroup] = lambda group: group
) -> Iterator[GpuEngine]:
    secret, tp = secrets.token_hex(8), worker.tensor_parallel_size
    with GroupListener(tp, secret=secret) as listener, spawn_ranks(listener.address, tp, secret) as ranks:
        with listener.accept(120.0, ranks.check) as group:
            group.load(worker, _Phases().show, LOAD_TIMEOUT_S)
            system = GpuEngine(port)
            system.engine = Engine(EngineConfig(), wrap(group), port, system.deliver, digest=_digest if port is not None else None)
            thread = threading.Thread(target=system.engine.run, name="engine")
            thread.start()
            try:
                yield system
            finally:
                system.engine.stop()
                thread.join(30.0)


def _digest() -> bytes:
    """Stands for the hash of a checkpoint's files, which would take tens of seconds: the store of a benchmark has one engine only."""
    return hash_fields("bench", b"")


class _Phases:
    """Shows the beginning and the end of each phase of a load, with the time since it began."""

    def __init__(self) -> None:
        self._began_s: dict[str, float] = {}

    def show(self, rank: int, phase: str, done: int, total: int) -> None:
        if not rank and done in (0, total):
            began_s = self._began_s.setdefault(phase, time.perf_counter())
            print(f"  {phase} {done}/{total} at {time.perf_counter() - began_s:.1f} s", file=sys.stderr, flush=True)
