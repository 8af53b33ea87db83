"""`checkpoints` and `model_driver` of this folder are importable from every test. Fixtures import what they need when they are used."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cache_store.process import StoreProcess
    from workers.local import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would the services of the tests
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]

MAX_RANKS = 4  # of one group


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small random checkpoints, made on first use (`tests/checkpoints.py`)."""
    from checkpoints import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def one_torch_thread() -> Iterator[None]:
    """More threads than cores would make small steps slower and their times erratic."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digest_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Weights digests are remembered in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """One pool of rank processes for the whole session, since importing torch costs seconds. They start when first needed, and serve one
    group after the other."""
    from tests.integration.replicas import ROOT
    from workers.local import RankPool

    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with RankPool(MAX_RANKS, env={"PYTHONPATH": os.pathsep.join(paths)}) as pool:
        yield pool


@pytest.fixture
def start_store() -> Iterator[Callable[..., StoreProcess]]:
    """Starts real stores, each in shared memory of its own; nothing may be left of them."""
    from cache_store.config import StoreConfig
    from cache_store.process import StoreProcess
    from tests.integration.replicas import SECRET

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
