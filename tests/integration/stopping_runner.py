"""A rank that stops itself (SIGSTOP) inside a copy: after the checks that let the copy start, before its first byte."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from workers.config import WorkerConfig
from workers.parallel import Communicator
from workers.runner import Runner
from workers.weights import Progress


def trigger(folder: Path, lane: str, rank: int) -> Path:
    """The file that makes `rank`'s next copy of this `lane` ("loads" or "saves") stop; removed by it."""
    return folder / f"stop-{lane}-{rank}"


class StoppingRunner(Runner):
    def __init__(self, config: WorkerConfig, comm: Communicator, progress: Progress) -> None:
        super().__init__(config, comm, progress)
        self.pool = _StoppingPool(self.pool, Path(config.model), comm.rank)  # type: ignore[assignment]


class _StoppingPool:
    """A PagePool; a copy asks it for a page right before it moves bytes."""

    def __init__(self, pool: Any, folder: Path, rank: int) -> None:
        self._pool, self._folder, self._rank = pool, folder, rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def page_bytes(self, page: int) -> Any:
        try:
            trigger(self._folder, threading.current_thread().name, self._rank).unlink()
        except FileNotFoundError:
            pass  # not asked to, or another copy thread was first
        else:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # in effect before the call returns
        return self._pool.page_bytes(page)
