"""A front door over real parts that is driven from outside its loop, and what the fuzz tests share.

`MOBULA_FUZZ_EXAMPLES=3000 python -m pytest tests/runtime/frontdoor/test_fuzz_*.py -s` sends more, and prints how many of what were sent and
how they ended.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings

from runtime.loop import LoopThread
from tests.runtime.frontdoor.conftest import Setup, ids_request, running, tokens_of
from tests.runtime.frontdoor.fake_engine import eventually
from tests.runtime.frontdoor.real_engine import expected

T = TypeVar("T")

WITNESS = list(range(60, 90))
NUM_WITNESS_TOKENS = 12
NUM_EXAMPLES = int(os.environ.get("MOBULA_FUZZ_EXAMPLES", "120"))
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


class Stage:
    """A front door over real parts, on a loop of its own, for tests that are driven from outside it."""

    def __init__(self, folder: Path, *engines: Any) -> None:
        self.thread = LoopThread("stage")
        self.engines = engines
        self._context = running(folder, list(engines))
        self.setup: Setup = self.do(self._context.__aenter__())

    def do(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return self.thread.run(work, timeout_s)

    def close(self) -> None:
        self.do(self._context.__aexit__(None, None, None))
        self.thread.close()

    async def witness(self) -> None:
        request = ids_request(WITNESS, max_tokens=NUM_WITNESS_TOKENS, ignore_eos=True)
        assert tokens_of(await self.setup.generate(request, timeout=30)) == expected(WITNESS, NUM_WITNESS_TOKENS)


def check_idle(stage: Stage) -> None:
    async def check() -> None:
        await eventually(stage.engines[0].is_idle)
        await eventually(lambda: len(stage.setup.door._live) == 0)
        stage.setup.check_idle()

    stage.do(check())
    assert stage.engines[0].engine.check() == []


def report(title: str, counts: Counter[Any]) -> None:
    print(f"\n{title}: {sum(counts.values())} sent; " + ", ".join(f"{count} {key}" for key, count in sorted(counts.items(), key=str)))
