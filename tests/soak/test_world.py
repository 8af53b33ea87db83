"""The soak's own parts: two stores, three replicas, and answers that follow from what is in their pages."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from tests.soak.chain_runner import expected_tokens
from tests.soak.world import MARK, World


def test_every_replica_answers_as_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "test")
    (tmp_path / "memory").mkdir()
    (tmp_path / "disk").mkdir()
    world = World(tmp_path / "memory", tmp_path / "disk")
    try:
        world.wait_ready()
        prompt = list(range(100))
        for replica in world.replicas:
            replica.send({"id": replica.name, "prompt": prompt, "max_tokens": 5})
        answers = {}
        while len(answers) < len(world.replicas):
            replica, message = world.inbox.get(timeout=20.0)
            assert message is not None, replica.last_words()
            answers[replica.name] = message["tokens"]
        assert list(answers.values()) == [expected_tokens(prompt, 5)] * len(world.replicas)
        with pytest.raises(queue.Empty):
            world.inbox.get_nowait()
    finally:
        world.close()
