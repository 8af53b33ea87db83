"""The Ray actors. Each is a thin shell: it starts one part of the runtime in its process and answers probes about it.

Nothing here is on the path of a step or a token.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from cache_store.errors import StoreError
from cache_store.garbage import settle
from runtime.controller.spec import EngineState, NodeState, Progress
from runtime.errors import CheckpointError, MobulaError, NotEnoughMemory
from runtime.loop import LoopThread

if TYPE_CHECKING:
    from cache_store.config import StoreConfig
    from runtime.engine.config import EngineConfig
    from runtime.frontdoor.config import FrontDoorConfig
    from runtime.routing.types import Membership
    from workers.config import WorkerConfig

log = logging.getLogger(__name__)

RANKS_CONNECT_TIMEOUT_S = 120.0  # importing torch on a busy machine
LOAD_TIMEOUT_S = 600.0  # without any progress


def current_node_id() -> str:
    import ray

    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


class EngineActor:
    """One replica's engine. `listen`, then workers are started with its address, then `load`, then it serves until `stop` or a failure."""

    def __init__(self, replica_id: str, world_size: int, secret: str) -> None:
        from workers.group import GroupListener

        logging.basicConfig(level=logging.INFO)
        self._replica_id = replica_id
        self._secret = secret
        self._listener = GroupListener(world_size, secret=secret)
        self._progress: dict[int, Progress] = {}
        self._phase, self._detail, self._address, self._permanent = "waiting", "", "", False
        self._stop_engine: Callable[[], None] = lambda: None

    def listen(self) -> tuple[str, str]:
        """The address the ranks connect to, and the node it is on."""
        return self._listener.address, current_node_id()

    def load(self, worker: WorkerConfig, engine: EngineConfig, store_address: str, host: str) -> str:
        self._phase = "loading"
        threading.Thread(target=self._serve, args=(worker, engine, store_address, host), name="engine", daemon=True).start()
        return self._phase

    def state(self) -> EngineState:
        return EngineState(self._phase, self._detail, self._address, current_node_id(), sorted(self._progress.values()), self._permanent)

    def stop(self) -> None:
        """Ends the engine in order; an engine that is still loading ends with its actor."""
        self._stop_engine()

    def _serve(self, worker: WorkerConfig, config: EngineConfig, store_address: str, host: str) -> None:
        try:
            self._run(worker, config, store_address, host)
            self._phase = "stopped"
        except MobulaError as error:
            self._permanent = isinstance(error, CheckpointError | NotEnoughMemory)
            self._detail, self._phase = f"{type(error).__name__}: {error}", "failed"
            log.error("engine %s: %s", self._replica_id, self._detail)
        except Exception as error:  # ours, but the controller must hear of it to make another
            self._detail, self._phase = f"{type(error).__name__}: {error}", "failed"
            log.exception("engine %s failed", self._replica_id)
        finally:
            self._listener.close()

    def _run(self, worker: WorkerConfig, config: EngineConfig, store_address: str, host: str) -> None:
        import ray

        from runtime.engine.replica import ReplicaEndpoints, serve_replica

        def on_progress(rank: int, phase: str, done: int, total: int) -> None:
            self._progress[rank] = Progress(rank, phase, done, total)

        def on_ready(address: str, stop: Callable[[], None]) -> None:
            settle()
            self._stop_engine = stop
            self._address, self._phase = address, "ready"

        with self._listener.accept(RANKS_CONNECT_TIMEOUT_S) as group:
            group.load(worker, on_progress, LOAD_TIMEOUT_S)
            public_host = host if host == "127.0.0.1" else ray.util.get_node_ip_address()
            endpoints = ReplicaEndpoints(store_address, self._secret, host, public_host)
            serve_replica(group, config, worker, endpoints, on_ready)


class WorkerActor:
    """One rank. Imports what it will need until it is started, then lives as long as its engine's socket."""

    def __init__(self, rank: int, secret: str) -> None:
        from workers.worker import preload

        logging.basicConfig(level=logging.INFO)
        self._rank, self._secret = rank, secret
        preload()

    def start(self, address: str) -> int:
        """Begins to serve the engine at `address`; returns the pid."""
        threading.Thread(target=self._run, args=(address,), name="rank", daemon=True).start()
        return os.getpid()

    def _run(self, address: str) -> None:
        from workers.worker import run_rank

        code = 1
        try:
            run_rank(address, self._rank, self._secret)
            code = 0
        finally:
            os._exit(code)  # the group is over: the actor and its GPU go with it, whatever threads are left


class StoreActor:
    """One node's cache store, as a child process that survives nothing of ours and is restarted when it dies."""

    def __init__(self, config: StoreConfig) -> None:
        import ray

        from cache_store.process import StoreProcess

        logging.basicConfig(level=logging.INFO)
        if config.peer_address.startswith("0.0.0.0:"):  # peers need a name for this node
            config = dataclasses.replace(config, peer_address=f"{ray.util.get_node_ip_address()}:0")
        self._secret = config.secret
        self._process = StoreProcess(config)
        self._process.start(timeout_s=30.0)

    def describe(self) -> NodeState:
        return NodeState(current_node_id(), self._process.address, self._process.state, self._process.peer_address)

    def set_peers(self, addresses: list[str]) -> None:
        """Tells the store where it may pull from. One that does not answer is told again with the next push."""
        from cache_store.client import StoreClient

        async def tell() -> None:
            async with StoreClient(self._process.address, self._secret) as client:
                await client.set_peers(addresses)

        try:
            asyncio.run(tell())
        except StoreError as error:
            log.info("the store has not heard of its peers: %s", error)

    def pid(self) -> int:
        pid: int = self._process.pid
        return pid

    def stop(self) -> None:
        self._process.stop()


class FrontDoorActor:
    """One node's front door, on a loop of its own."""

    def __init__(self, config: FrontDoorConfig) -> None:
        from runtime.frontdoor.server import FrontDoor

        logging.basicConfig(level=logging.INFO)
        self._thread = LoopThread("frontdoor")
        self._door = FrontDoor(config)
        self._address = self._thread.run(self._door.start(), 30.0)
        settle()

    def describe(self) -> NodeState:
        return NodeState(current_node_id(), self._address, "ready")

    def set_membership(self, membership: Membership) -> int:
        self._thread.run(self._door.set_membership(membership), 10.0)
        version: int = membership.version
        return version

    def stop(self, grace_s: float) -> None:
        """Refuses new requests, lets running ones finish for up to `grace_s`."""
        self._thread.run(self._door.stop(grace_s), grace_s + 10.0)
