"""`mobula generate` without a service: what it writes where. The deployment is faked; tests/cluster runs a real one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from protos import inference_pb2 as pb
from runtime.commands import generate
from runtime.config import ServeSettings

EVENTS = [
    pb.GenerateEvent(started=pb.Started(replica_id="r")),
    pb.GenerateEvent(tokens=pb.Tokens(token_ids=[7, 8], text="two")),
    pb.GenerateEvent(finished=pb.Finished(reason=pb.LENGTH, usage=pb.Usage(num_completion_tokens=2))),
]


@pytest.mark.parametrize("as_json", [False, True])
def test_only_the_answer_is_on_standard_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    @contextlib.contextmanager
    def noisy(settings: ServeSettings, *, front_doors: bool) -> Iterator[Any]:
        print("a worker has started")
        yield SimpleNamespace(wait_ready=lambda timeout_s, show: None, membership=lambda: None, spec=SimpleNamespace(secret=""))
        print("a worker has died")

    @contextlib.contextmanager
    def events(door: object, request: object) -> Iterator[Iterator[pb.GenerateEvent]]:
        yield iter(EVENTS)

    monkeypatch.setattr(generate, "deployed", noisy)
    monkeypatch.setattr(generate, "OfflineDoor", lambda config, membership: None)
    monkeypatch.setattr(generate, "_offline_events", events)
    generate.generate_offline(ServeSettings(), pb.GenerateRequest(), as_json=as_json, console=Console(stderr=True))
    written = capsys.readouterr()
    if as_json:
        assert json.loads(written.out)["token_ids"] == [7, 8]
    else:
        assert written.out == "two\n"
    assert "a worker has died" in written.err
