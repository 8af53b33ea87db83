"""One replica's life, advanced by looking, never by waiting.

    PLACING --placed--> CONNECTING --engine listens--> LOADING --engine ready--> READY
       any state --death, missed deadline, failure--> LOST

A lost replica is torn down by its owner, the controller, which makes a new one under a new id: ids are never reused, so a late message
from an old incarnation finds nobody.
"""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING, Any

from runtime.controller import placement
from runtime.controller.ray_cluster import find_actor, kill_actor, remove_placement_group_named
from runtime.controller.remote_call import RemoteCall, RemoteCallFailed
from runtime.controller.spec import DeploymentSpec, EngineState, Progress, ReplicaReport
from runtime.routing.types import ReplicaMember

if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.engine.config import EngineConfig

PLACE_TIMEOUT_S = 120.0
LISTEN_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 10.0  # a step never holds up the engine process for longer


class ReplicaPhase(enum.StrEnum):
    PLACING = "placing"
    CONNECTING = "connecting"
    LOADING = "loading"
    READY = "ready"
    LOST = "lost"


class Replica:
    """Owned by the controller. `advance` does what can be done now and returns."""

    def __init__(
        self, spec: DeploymentSpec, replica_id: str, engine_config: EngineConfig, store_address_of: Callable[[str], str | None]
    ) -> None:
        self.replica_id = replica_id
        self.phase = ReplicaPhase.PLACING
        self.detail = ""
        self.permanent = False
        self._spec = spec
        self._engine_config = engine_config
        self._store_address_of = store_address_of
        self._progress: list[Progress] = []
        self._address = ""
        self._engine: Any = None
        self._workers: list[Any] = []
        self._group: Any = None
        self._call: RemoteCall[Any] | None = None
        self._starts: list[RemoteCall[Any]] = []
        self._placed_by = time.monotonic() + PLACE_TIMEOUT_S

    def start(self) -> None:
        self._group = placement.create_group(self._spec, self.replica_id)
        self._call = RemoteCall(self._group.ready(), "placement", PLACE_TIMEOUT_S)

    def adopt(self) -> None:
        """Takes over what a former controller started: the next probe says how far it is."""
        self._engine = find_actor(placement.engine_name(self.replica_id), self._spec.namespace)
        self.phase = ReplicaPhase.LOADING

    def advance(self) -> None:
        """Moves on when the awaited answer is there. Failures end in LOST, with the reason in `detail`."""
        try:
            for call in list(self._starts):
                if call.poll() is not None:
                    self._starts.remove(call)
            if self.phase is ReplicaPhase.PLACING:
                self._advance_placing()
            elif self.phase is ReplicaPhase.CONNECTING:
                self._advance_connecting()
            elif self.phase in (ReplicaPhase.LOADING, ReplicaPhase.READY):
                self._advance_serving()
        except RemoteCallFailed as error:
            self._lose(str(error))

    def _advance_placing(self) -> None:
        assert self._call is not None
        try:
            placed = self._call.poll()
        except RemoteCallFailed as error:
            need = f"{self._spec.settings.tensor_parallel_size} {'GPUs' if self._spec.use_gpu else 'CPU ranks'} on one node"
            raise RemoteCallFailed(f"no room for a replica ({need}): {error}") from error
        if placed is not None:
            ranks = range(self._spec.settings.tensor_parallel_size)
            self._workers = [placement.create_worker(self._spec, self.replica_id, self._group, rank) for rank in ranks]
            self._engine = placement.create_engine(self._spec, self.replica_id, self._group)
            self._call = RemoteCall(self._engine.listen.remote(), "engine start", LISTEN_TIMEOUT_S)
            self.phase = ReplicaPhase.CONNECTING

    def _advance_connecting(self) -> None:
        assert self._call is not None
        answer = self._call.poll()
        if answer is None:
            return
        address, node_id = answer
        store_address = self._store_address_of(node_id)
        if store_address is None:
            return  # its store is still starting; poll() keeps answering
        for rank, worker in enumerate(self._workers):
            self._starts.append(RemoteCall(worker.start.remote(address), f"rank {rank} start", LISTEN_TIMEOUT_S))
        host = "127.0.0.1" if self._spec.settings.host in ("127.0.0.1", "localhost") else "0.0.0.0"
        load = self._engine.load.remote(self._spec.settings.worker_config(), self._engine_config, store_address, host)
        self._starts.append(RemoteCall(load, "engine load", LISTEN_TIMEOUT_S))
        self._call = None
        self.phase = ReplicaPhase.LOADING

    def _advance_serving(self) -> None:
        if self._call is None:
            self._call = RemoteCall(self._engine.state.remote(), "engine", PROBE_TIMEOUT_S)
            return
        state: EngineState | None = self._call.poll()
        if state is None:
            return
        self._call = None
        self._progress, self._address = state.progress, state.address
        if state.phase == "ready":
            self.phase = ReplicaPhase.READY
        elif state.phase in ("failed", "stopped"):
            self.permanent = state.permanent
            self._lose(state.detail or "the engine stopped")
        elif state.phase == "waiting" and not self._workers:
            self._lose("its former controller died before its ranks were made")

    def _lose(self, reason: str) -> None:
        self.phase, self.detail, self._address = ReplicaPhase.LOST, reason, ""

    def request_stop(self) -> Any | None:
        """Asks the engine to end; returns the reference of the answer."""
        return self._engine.stop.remote() if self._engine is not None else None

    def remove(self) -> None:
        """Kills what is left of it, by name."""
        names = [placement.engine_name(self.replica_id)]
        names += [placement.worker_name(self.replica_id, rank) for rank in range(self._spec.settings.tensor_parallel_size)]
        for name in names:
            kill_actor(name, self._spec.namespace)
        remove_placement_group_named(placement.group_name(self._spec, self.replica_id))

    @property
    def member(self) -> ReplicaMember:
        address = self._address if self.phase is ReplicaPhase.READY else ""
        return ReplicaMember(self.replica_id, address, self.phase.value, self.detail, self._spec.settings.tensor_parallel_size)

    @property
    def report(self) -> ReplicaReport:
        return ReplicaReport(self.replica_id, self.phase.value, self.detail, self._progress, self.permanent)
