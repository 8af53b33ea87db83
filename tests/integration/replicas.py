"""Whole replicas without Ray: a real engine on its own thread, over real rank processes and a real store.

Replica.ask --submit--> Engine --plans--> RankGroup --unix sockets--> ranks of the session's RankPool
                           \\--questions--> RemoteStore --gRPC--> StoreProcess, its arena mapped by the ranks
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from cache_store.client import StoreClient
from cache_store.outcomes import StoreStat
from cache_store.process import StoreProcess
from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.frames import Load, RequestOutput
from runtime.engine.live import EngineRequest
from runtime.engine.store_port import RemoteStore
from runtime.errors import GroupFailed
from runtime.request import CachedTokens
from workers.config import WorkerConfig
from workers.digest import weights_digest
from workers.group import GroupListener
from workers.local import RankPool
from workers.step import ALL_LOGPROBS, SamplingSettings, StepPlan
from workers.worker import MODEL, RankParts

ROOT = Path(__file__).resolve().parents[2]
SECRET = "between us"
WAIT_S = 120.0  # for anything; a busy machine is no failure
GREEDY = SamplingSettings(temperature=0.0)
SCORED = SamplingSettings(temperature=0.0, num_logprobs=ALL_LOGPROBS, num_prompt_logprobs=ALL_LOGPROBS)


class Answer(NamedTuple):
    """All that an engine said about one request."""

    token_ids: list[int]
    cached: CachedTokens
    finish_reason: str
    prompt_logprobs: list[Any]  # as in workers.step.RowResult, one per step that had some
    logprobs: list[Any]

    def scores(self, vocab_size: int) -> np.ndarray:
        """Log-softmax at the scored prompt positions, then at the outputs, [positions, vocabulary]; of a request that asked for all."""
        return np.frombuffer(b"".join([*self.prompt_logprobs, *self.logprobs]), "<f4").reshape(-1, vocab_size)

    def prompt_nlls(self) -> np.ndarray:
        """Negative log-likelihood of each scored prompt token; of a request that asked for the chosen tokens' logprobs."""
        return np.array([-position[0][1] for piece in self.prompt_logprobs for position in piece])


def worker_config(folder: Path, tp: int = 1, **settings: Any) -> WorkerConfig:
    """Small pages and a pool of 8 MiB unless told otherwise."""
    defaults = {"device": "cpu", "block_size": 16, "kv_memory_bytes": 8 << 20, "max_num_seqs": 16}
    return WorkerConfig(str(folder), tensor_parallel_size=tp, **{**defaults, **settings})


class Replica:
    """One group of the pool's ranks and the engine over it. Only one at a time may use a pool; `close` gives the ranks back.

    `processes` besides the ranks are registered with the store, which may kill them: never this one. `load_within_s` bounds what a model
    may take from one sign of progress to the next.
    """

    def __init__(
        self,
        pool: RankPool,
        worker: WorkerConfig,
        store_address: str | None = None,
        *,
        parts: RankParts = MODEL,
        load_within_s: float = WAIT_S,
        make_port: Callable[..., RemoteStore] = RemoteStore,
        processes: tuple[tuple[int, int], ...] = (),
        sink: Callable[[dict[int, list[RequestOutput]], Load], None] | None = None,
        **engine: Any,
    ) -> None:
        tp = worker.tensor_parallel_size
        with GroupListener(tp, secret=SECRET) as listener:
            pool.serve(listener.address, tp, SECRET, parts=parts)
            self.group = listener.accept(WAIT_S, check=pool.check)
        self.group.load(worker, lambda *progress: None, load_within_s)
        self.info = self.group.info
        self._outputs: dict[str, list[RequestOutput]] = {}
        self._news = threading.Condition()
        self._names = itertools.count()
        self.failure: GroupFailed | None = None
        self.port = make_port(store_address, SECRET, f"tp {tp}", probe_every_s=0.1) if store_address else None
        self.engine = Engine(
            EngineConfig(**engine),
            self.group,
            self.port,
            sink or self._hear,
            digest=lambda: weights_digest(worker.model),
            processes=processes,
        )
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()
        await_true(lambda: self.engine.hello().root is not None, lambda: "the weights digest is not known")
        if self.port is not None:
            self.await_stats(lambda stats: stats.store_state == "ready")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, prompt: Sequence[int], max_tokens: int, sampling: SamplingSettings = GREEDY) -> str:
        """The request's id, for `answer`."""
        request_id = f"request {next(self._names)}"
        self.engine.submit(EngineRequest(0, request_id, array("I", prompt), sampling, max_tokens))
        return request_id

    def answer(self, request_id: str) -> Answer:
        """Waits for the end of a request, which must not be an error."""
        outputs = self.outputs(request_id)
        assert outputs[-1].error is None, outputs[-1].error
        assert outputs[-1].finish_reason is not None
        (cached,) = [CachedTokens(*output.cached) for output in outputs if output.cached is not None]
        return Answer(
            [token for output in outputs for token in output.token_ids],
            cached,
            outputs[-1].finish_reason,
            [output.prompt_logprobs for output in outputs if output.prompt_logprobs],
            [output.logprobs for output in outputs if output.logprobs],
        )

    def outputs(self, request_id: str) -> list[RequestOutput]:
        """Everything about a request, once it has ended in whatever way."""
        with self._news:
            assert self._news.wait_for(lambda: self._is_over(request_id), WAIT_S), f"{request_id} has no end: {self.engine.stats()}"
            return self._outputs[request_id]

    def ask(self, prompt: Sequence[int], max_tokens: int, sampling: SamplingSettings = GREEDY) -> Answer:
        return self.answer(self.submit(prompt, max_tokens, sampling))

    def await_stats(self, condition: Callable[[Any], bool]) -> None:
        await_true(lambda: condition(self.engine.stats()), lambda: str(self.engine.stats()))

    def await_offers(self) -> None:
        """Every full block was offered to the store, and no slot is held any more."""
        self.await_stats(lambda stats: stats.blocks_pending_offer == stats.leased_slots == 0)

    def stop(self) -> None:
        """Ends the engine's thread; the group stays, for whoever wants to look into its pages."""
        self.engine.stop()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.stop()
        problems = self.engine.check()
        if self.port is not None:
            self.port.close()
        self.group.close()
        assert problems == []

    def _run(self) -> None:
        self.failure = self.engine.run()

    def _hear(self, outputs: dict[int, list[RequestOutput]], _load: Load) -> None:
        with self._news:
            for batch in outputs.values():
                for output in batch:
                    self._outputs.setdefault(output.request_id, []).append(output)
            self._news.notify_all()

    def _is_over(self, request_id: str) -> bool:
        outputs = self._outputs.get(request_id)
        return bool(outputs and (outputs[-1].finish_reason or outputs[-1].error))


def watch_plans(replica: Replica) -> list[StepPlan]:
    """Those that are sent from now on."""
    plans, submit = [], replica.group.submit

    def watched(plan: StepPlan) -> None:
        plans.append(plan)
        submit(plan)

    replica.group.submit = watched  # type: ignore[method-assign]
    return plans


def await_true(condition: Callable[[], bool], describe: Callable[[], str], timeout_s: float = WAIT_S) -> None:
    """Polls until true; fails the test with `describe()` at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, describe()
        time.sleep(0.005)


def ask_store(store: StoreProcess) -> tuple[StoreStat, list[str]]:
    """What the store counts, and which of its invariants are violated."""

    async def ask() -> tuple[StoreStat, list[str]]:
        async with StoreClient(store.address, SECRET) as client:
            return await client.stat(), await client.check()

    return asyncio.run(ask())
