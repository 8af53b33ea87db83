"""Runners with faults, named on the command line of rank processes (`workers.worker.RankParts`); this folder is on their PYTHONPATH."""

import os
import signal
import threading
from typing import Any

from workers.config import WorkerConfig
from workers.echo import EchoRunner
from workers.errors import UnknownArchitecture
from workers.step import RowResult, StepPlan

BAD_ROW = 13  # what a plan says to set off a fault


class FailsInStep(EchoRunner):
    """Rank 1 raises on BAD_ROW; the others then wait for it for ever, as in a collective."""

    def __init__(self, config: WorkerConfig, comm: Any, progress: Any) -> None:
        super().__init__(config, comm, progress)
        self._rank = comm.rank

    def collect(self, plan: StepPlan) -> list[RowResult]:
        if any(row.row_id == BAD_ROW for row in plan.rows):
            if self._rank == 1:
                raise RuntimeError("row 13 is unlucky")
            threading.Event().wait()
        return super().collect(plan)


class DiesInStep(FailsInStep):
    """Rank 1 is killed on BAD_ROW; the others complain about it, as gloo does."""

    def collect(self, plan: StepPlan) -> list[RowResult]:
        if any(row.row_id == BAD_ROW for row in plan.rows):
            if self._rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("Connection closed by peer")
        return super().collect(plan)


class FailsToLoad(EchoRunner):
    def __init__(self, config: WorkerConfig, comm: Any, progress: Any) -> None:
        if comm.rank == 1:
            raise UnknownArchitecture("config.json: MambaForCausalLM is not in the table of models")
        threading.Event().wait()


class LoadsForEver(EchoRunner):
    """Rank 0 loads; the others report progress once and stop."""

    def __init__(self, config: WorkerConfig, comm: Any, progress: Any) -> None:
        super().__init__(config, comm, progress)
        if comm.rank > 0:
            progress("weights", 3, 12)
            threading.Event().wait()


class LoadsSomethingElse(EchoRunner):
    def __init__(self, config: WorkerConfig, comm: Any, progress: Any) -> None:
        super().__init__(config, comm, progress)
        self.info_fields["num_pages"] += comm.rank  # may differ
        if config.seed:
            self.info_fields["vocab_size"] += comm.rank


class BigResults(EchoRunner):
    """As many bytes of logprobs per row as the row has query tokens."""

    def collect(self, plan: StepPlan) -> list[RowResult]:
        return [RowResult(row.row_id, [1], b"x" * row.num_query_tokens) for row in plan.rows]
