"""A real engine behind its real channel, over the simulated group: what the front door's tests need of a whole replica."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(_TESTS / "runtime" / "engine"), str(_TESTS / "simulation")]

from realtime import RealStoreGroup, RealtimeGroup, Running, expected  # noqa: E402
from simulated_group import make_info  # noqa: E402

from cache_store.keys import Layout  # noqa: E402
from runtime.engine.engine import Engine  # noqa: E402
from runtime.engine.frames import Hello, Load  # noqa: E402
from runtime.engine.server import EngineServer  # noqa: E402
from runtime.engine.store_port import Lookup, Question, StoreEvent, StorePort, StoreState  # noqa: E402

__all__ = ["MAX_LEN", "RealEngine", "RealStoreGroup", "SilentStore", "expected", "make_info"]

MAX_LEN = 200


class SilentStore:
    """Takes lookups and never answers them."""

    state = StoreState.READY

    def __init__(self) -> None:
        self.num_lookups = 0
        self._tickets = itertools.count(1)

    def start(self, layout: Layout, processes: Sequence[tuple[int, int]], wake: Callable[[], None]) -> None: ...

    def ask(self, question: Question) -> int | None:
        if not isinstance(question, Lookup):
            return None
        self.num_lookups += 1
        return next(self._tickets)

    def send(self) -> None: ...

    def poll(self) -> list[StoreEvent]:
        return []

    def close(self) -> None: ...


class RealEngine:
    """Started and stopped like `fake_engine.FakeEngine`. `group.gate` cleared keeps every result back."""

    def __init__(
        self,
        replica_id: str = "r0",
        *,
        step_s: float = 0.0,
        num_pages: int = 120,
        store: StorePort | None = None,
        group: RealtimeGroup | None = None,
        secret: str = "",
        **config: object,
    ) -> None:
        self.group = group or RealtimeGroup(make_info(num_pages, max_model_len=MAX_LEN), step_s=step_s)
        self._secret = secret
        self._config = {"replica_id": replica_id, "max_num_seqs": 8, "max_num_batched_tokens": 32, "idle_poll_s": 0.05, **config}
        self._store = store
        self._server: EngineServer | None = None
        self._running: Running | None = None
        self.port = 0

    @property
    def engine(self) -> Engine:
        assert self._running is not None
        return self._running.engine

    @property
    def hello(self) -> Hello:
        return self.engine.hello()

    @property
    def num_streams(self) -> int:
        return len(self._server._streams) if self._server else 0

    async def start(self) -> str:
        server = self._server = EngineServer(secret=self._secret)
        self._running = Running(self.group, sink=server.deliver, store=self._store, **self._config)
        self.port = await asyncio.to_thread(server.start, self.engine)
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        if self._running is not None and self._server is not None:
            await asyncio.to_thread(self._running.close)
            await asyncio.to_thread(self._server.stop)

    def is_idle(self) -> bool:
        """Whether nothing is left of any request: rows, queue, pages, leases."""
        stats = self.engine.stats()
        held = (stats.num_running, stats.num_waiting, stats.used_pages, stats.leased_slots)
        return held == (0, 0, 0, 0) and self.engine.load == Load(0, 0, 0)
