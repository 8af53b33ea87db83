"""One replica's engine process, put together: the engine, its channel to front doors, its port to the node's store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

from cache_store.processes import process_identity
from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.rates import ReplicaRates
from runtime.engine.server import EngineServer
from runtime.engine.store_port import RemoteStore
from workers.config import WorkerConfig
from workers.digest import weights_digest
from workers.step import WorkerGroup


class ReplicaEndpoints(NamedTuple):
    """Where a replica finds its store, and where front doors find it."""

    store_address: str  # empty: no store
    secret: str
    host: str  # to listen on
    public_host: str  # under which other nodes reach `host`


def serve_replica(
    group: WorkerGroup,
    config: EngineConfig,
    worker: WorkerConfig,
    endpoints: ReplicaEndpoints,
    on_ready: Callable[[str, Callable[[], None]], None],
) -> None:
    """Steps until stopped. `on_ready` gets the channel's address and what makes this function return. Raises the group's GroupFailed."""
    with contextlib.ExitStack() as stack:
        server = EngineServer(secret=endpoints.secret, host=endpoints.host)
        stack.callback(server.stop)
        store = None
        rates = ReplicaRates()
        if endpoints.store_address:
            store = stack.enter_context(RemoteStore(endpoints.store_address, endpoints.secret, config.replica_id, rates=rates))
        engine = Engine(
            config,
            group,
            store,
            server.deliver,
            digest=lambda: weights_digest(worker.model),
            processes=(process_identity(os.getpid()),),
            rates=rates,
        )
        on_ready(f"{endpoints.public_host}:{server.start(engine)}", engine.stop)
        failure = engine.run()
        if failure is not None:
            raise failure
