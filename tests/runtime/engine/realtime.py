"""An engine on its own thread, over a simulated group that blocks like a real one."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from simulated_group import Clock, SimulatedGroup, Slot, _Copy, extend_chain, next_token

from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.frames import Load, RequestOutput
from runtime.engine.store_port import StorePort
from runtime.errors import GroupFailed
from workers.step import CopyResult, GroupInfo, StepPlan, StepResult

WAIT_S = 10.0


class RealtimeGroup(SimulatedGroup):
    """Blocks like a real one; `gate` closed keeps every result back."""

    def __init__(self, info: GroupInfo, step_s: float = 0.0) -> None:
        super().__init__(info, random.Random(1), Clock(), lateness=0.0)
        self.gate = threading.Event()
        self.gate.set()
        self.num_polls = 0
        self.step_s = step_s
        self._wake = threading.Event()

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    def poll(self, timeout_s: float) -> list[StepResult | CopyResult]:
        self.num_polls += 1
        if self.failure:
            raise self.failure
        if self.is_idle or not self.gate.is_set():
            self._wake.wait(timeout_s)
            self._wake.clear()
        if self.failure:
            raise self.failure
        if not self.gate.is_set() or self.is_idle:
            return []
        time.sleep(self.step_s)
        return super().poll(1.0)


class RealStoreGroup(RealtimeGroup):
    """Its arena is simulated, but the store that hands out the slots is a real one: a slot is what was last saved into it."""

    def _fails(self, copy: _Copy) -> str:
        assert copy.arena is not None
        slot = copy.arena.slots.setdefault(copy.copy.offset, Slot())
        if not copy.is_load:
            slot.generation = copy.copy.generation
        return "" if slot.generation == copy.copy.generation else "generation"


class Running:
    """An engine on its own thread, and what its sink was told."""

    def __init__(self, group: RealtimeGroup, **config: object) -> None:
        digest = config.pop("digest", None)
        store: StorePort | None = config.pop("store", None)  # type: ignore[assignment]
        sink = config.pop("sink", self.hear)
        self.group = group
        self.outputs: dict[tuple[int, str], list[RequestOutput]] = {}
        self.news = threading.Condition()
        self.engine = Engine(EngineConfig(**config), group, store, sink, digest=digest)  # type: ignore[arg-type]
        self.failure: list[GroupFailed | None] = []
        self.thread = threading.Thread(target=lambda: self.failure.append(self.engine.run()))
        self.thread.start()

    def hear(self, outputs: dict[int, list[RequestOutput]], _load: Load) -> None:
        with self.news:
            for stream, batch in outputs.items():
                for output in batch:
                    self.outputs.setdefault((stream, output.request_id), []).append(output)
            self.news.notify_all()

    def last(self, request_id: str, stream: int = 0) -> RequestOutput:
        """The last output of a request, once it has come."""
        with self.news:
            assert self.news.wait_for(lambda: any(o.finish_reason or o.error for o in self.outputs.get((stream, request_id), ())), WAIT_S)
            return self.outputs[stream, request_id][-1]

    def tokens(self, request_id: str, stream: int = 0) -> list[int]:
        self.last(request_id, stream)
        return [token for output in self.outputs[stream, request_id] for token in output.token_ids]

    def close(self) -> None:
        self.group.gate.set()
        self.engine.stop()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.002)


def expected(prompt: list[int], count: int) -> list[int]:
    chain: list[int] = []
    extend_chain(chain, prompt)
    new = []
    for _ in range(count):
        new.append(next_token(chain[-1]))
        extend_chain(chain, new[-1:])
    return new
