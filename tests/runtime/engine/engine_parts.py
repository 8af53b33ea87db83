"""What the engine's unit tests build with: requests, a scheduler driven by hand, a port that is answered by hand."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence

from cache_store.key_chains import KeyChains
from cache_store.keys import BlockKey, Layout, hash_fields
from runtime.engine.block_manager import BlockManager
from runtime.engine.config import EngineConfig
from runtime.engine.live import EngineRequest, LiveRequest
from runtime.engine.outputs import Outputs
from runtime.engine.scheduler import Launched, Scheduler
from runtime.engine.store_port import Question, StoreEvent, StoreState
from workers.step import RowResult, SamplingSettings, StepResult

ROOT = BlockKey(hash_fields("test root"))
BLOCK_SIZE = 4


def make_request(request_id: str, prompt: Sequence[int], max_tokens: int = 8, **fields: object) -> EngineRequest:
    return EngineRequest(0, request_id, array("I", prompt), fields.pop("sampling", SamplingSettings()), max_tokens, **fields)  # type: ignore[arg-type]


class Bench:
    """A scheduler and its pages, with results given by hand. Tokens count up from 1000 per row."""

    def __init__(self, num_pages: int = 100, max_model_len: int = 200, **config: object) -> None:
        self.config = EngineConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 16, **config})  # type: ignore[arg-type]
        self.blocks = BlockManager(num_pages, BLOCK_SIZE)
        self.scheduler = Scheduler(self.config, self.config.step_limits(256, 2048, 768), self.blocks)
        self.outputs = Outputs(self.blocks)
        self.max_model_len = max_model_len
        self.launched: list[Launched] = []
        self.arrivals = itertools.count()
        self.chains = KeyChains()

    def live(self, request: EngineRequest) -> LiveRequest:
        return LiveRequest(request, next(self.arrivals), 0.0, self.max_model_len, ROOT, self.chains)

    def add(self, request_id: str, prompt: Sequence[int] | int, max_tokens: int = 8, **fields: object) -> LiveRequest:
        """`prompt` as a number: that many tokens that nobody else has."""
        tokens = [hash((request_id, i)) % 10_000 for i in range(prompt)] if isinstance(prompt, int) else prompt
        live = self.live(make_request(request_id, tokens, max_tokens, **fields))
        self.scheduler.add(live)
        return live

    def plan(self) -> dict[str, int] | None:
        """Launches a step. Returns its tokens by request."""
        launched = self.scheduler.plan()
        if launched is None:
            return None
        self.launched.append(launched)
        self.outputs.admitted(launched)
        assert self.blocks.check() == []
        return {live.request.request_id: row.num_query_tokens for live, row in zip(launched.requests, launched.plan.rows, strict=True)}

    def apply(self, token: int = 1000) -> list[LiveRequest]:
        """The result of the oldest launched step: rows that sample get `token`."""
        launched = self.launched.pop(0)
        rows = []
        for live, row in zip(launched.requests, launched.plan.rows, strict=True):
            samples = live.num_confirmed + row.num_query_tokens >= len(live.tokens)
            rows.append(RowResult(row.row_id, [token] if samples else []))
        finished = self.outputs.apply(launched, StepResult(launched.plan.sequence, rows, 0.0), 1.0)
        for live in finished:
            self.scheduler.remove(live)
        assert self.blocks.check() == []
        return finished

    def step(self, token: int = 1000) -> dict[str, int] | None:
        planned = self.plan()
        if planned is not None:
            self.apply(token)
        return planned


class ScriptedPort:
    """A StorePort whose questions pile up in `asked` as (ticket, question)."""

    def __init__(self) -> None:
        self.state = StoreState.READY
        self.asked: list[tuple[int, Question]] = []
        self.is_full = False  # too many questions are open
        self._tickets = itertools.count(1)

    def start(self, layout: Layout, processes: Sequence[tuple[int, int]], wake: Callable[[], None]) -> None: ...

    def ask(self, question: Question) -> int | None:
        if self.state is not StoreState.READY or self.is_full:
            return None
        ticket = next(self._tickets)
        self.asked.append((ticket, question))
        return ticket

    def send(self) -> None: ...

    def poll(self) -> list[StoreEvent]:
        return []

    def close(self) -> None: ...

    def take(self, kind: type) -> tuple[int, Question]:
        """The oldest open question, which must be of this kind."""
        ticket, question = self.asked.pop(0)
        assert isinstance(question, kind), question
        return ticket, question
