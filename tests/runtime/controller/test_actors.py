"""The actors' shells, without Ray: what a probe hears of an engine that failed."""

from __future__ import annotations

import pytest

from runtime.controller.actors import EngineActor
from runtime.engine.config import EngineConfig
from runtime.errors import CheckpointError, GroupFailed
from workers.config import WorkerConfig


@pytest.mark.parametrize(
    ("error", "detail", "permanent"),
    [
        (GroupFailed("rank 1 died"), "GroupFailed: rank 1 died", False),
        (CheckpointError("no such tensor"), "CheckpointError: no such tensor", True),
        (TypeError("a bug of ours"), "TypeError: a bug of ours", False),
    ],
)
def test_any_failure_of_the_engine_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, detail: str, permanent: bool) -> None:
    def fail(*_: object) -> None:
        raise error

    actor = EngineActor("r0", 1, "secret")
    monkeypatch.setattr(actor, "_run", fail)
    actor._serve(WorkerConfig("none"), EngineConfig(), "", "127.0.0.1")
    assert (actor._phase, actor._detail, actor._permanent) == ("failed", detail, permanent)
