"""`python -m tests.integration.dying_engine STORE MODEL`: an engine that stands still between Reserve and Commit, to be killed there.

Prints the pids of its ranks when that point is reached.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from cache_store.processes import process_identity
from runtime.engine.store_port import Commit, Question, RemoteStore
from tests.integration.replicas import ROOT, Replica, worker_config
from workers.local import RankPool


class HaltingStore(RemoteStore):
    """Never gets to its first Commit."""

    def ask(self, question: Question) -> int | None:
        if isinstance(question, Commit):
            print(*self.rank_pids, flush=True)
            threading.Event().wait()
        return super().ask(question)

    rank_pids: list[int]


def main() -> None:
    store_address, model, *prompt = sys.argv[1:]
    with RankPool(2, env={"PYTHONPATH": str(ROOT)}) as pool:
        replica = Replica(
            pool, worker_config(Path(model), 2), store_address, make_port=HaltingStore, processes=(process_identity(os.getpid()),)
        )
        assert isinstance(replica.port, HaltingStore)
        replica.port.rank_pids = [pid for pid, _ in replica.info.pids]
        replica.submit([int(token) for token in prompt], 4)
        threading.Event().wait()


if __name__ == "__main__":
    main()
