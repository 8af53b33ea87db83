"""One pool of rank processes for the whole session, since importing torch costs seconds; and stores of a test's own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cache_store.config import StoreConfig
from cache_store.process import StoreProcess
from tests.integration.replicas import ROOT, SECRET
from workers.local import RankPool

MAX_RANKS = 4


@pytest.fixture(scope="module", autouse=True)
def digest_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Weights digests are remembered in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Processes start when first needed, and serve one group after the other."""
    with RankPool(MAX_RANKS, env={"PYTHONPATH": str(ROOT)}) as pool:
        yield pool


@pytest.fixture
def start_store() -> Iterator[Callable[..., StoreProcess]]:
    """Starts real stores, each in shared memory of its own; nothing may be left of them."""
    directory = Path(tempfile.mkdtemp(prefix="integration-", dir="/dev/shm"))
    started: list[StoreProcess] = []

    def start(memory_bytes: int = 16 << 20, extent_bytes: int = 1 << 20, **settings: Any) -> StoreProcess:
        folder = directory / str(len(started))
        folder.mkdir()
        config = StoreConfig(memory_bytes=memory_bytes, extent_bytes=extent_bytes, directory=str(folder), secret=SECRET, **settings)
        started.append(StoreProcess(config))
        started[-1].start(timeout_s=30.0)
        return started[-1]

    try:
        yield start
        for store in started:
            store.stop()
        left = [path for path in directory.rglob("*") if path.is_file()]
        assert left == [], f"left behind: {left}"
    finally:
        for store in started:
            store.stop()
        shutil.rmtree(directory)
