"""Starting or joining Ray, and the names under which a deployment's actors and placement groups live there.

Actors share the fate of their creator and of a placement group that is not detached, so everything here is named and detached, and removal
goes by name: `remove_everything` leaves nothing, whoever created it and whoever has died since.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from runtime.errors import DeploymentError

log = logging.getLogger(__name__)

CONTROLLER = "controller"
_RAY_OBJECT_STORE_BYTES = 80 << 20  # we pass no objects through it; Ray's minimum is 75 MiB
START_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # with a 127.0.0.1 node address: listen on loopback only
    "RAY_USAGE_STATS_ENABLED": "0",
    # When a raylet dies its workers kill their children; a store must rather see the end of its pipe and remove its files.
    "RAY_kill_child_processes_on_worker_exit": "0",
}


@dataclass(frozen=True, slots=True)
class RaySession:
    address: str
    node_id: str  # of the driver
    started_here: bool
    num_gpus: int


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: a Ray that was interrupted half started leaves processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    former = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if seen:
        ray_shutdown()
        raise KeyboardInterrupt


def ray_shutdown() -> None:
    import ray

    ray.shutdown()


@contextlib.contextmanager
def ray_session(deployment_namespace: str, *, address: str | None = None) -> Iterator[RaySession]:
    """Joins the cluster at `address` or RAY_ADDRESS, else starts a local one that ends with this block."""
    target = address or os.environ.get("RAY_ADDRESS")
    for name, value in START_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)  # after the import, which sets it
    options: dict[str, Any] = {
        "namespace": deployment_namespace,
        "log_to_driver": False,
        "logging_level": "error",
        "configure_logging": False,
    }
    if not target:
        options |= {"_node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": _RAY_OBJECT_STORE_BYTES}
    try:
        with interrupts_deferred():
            ray.init(address=target or "local", **options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {target}" if target else "a local Ray cluster"
        raise DeploymentError(f"cannot {'join' if target else 'start'} {where}: {error}") from error
    try:
        context = ray.get_runtime_context()
        yield RaySession(
            address=context.gcs_address,
            node_id=context.get_node_id(),
            started_here=not target,
            num_gpus=int(ray.cluster_resources().get("GPU", 0)),
        )
    finally:
        ray_shutdown()


def actor_names(namespace: str) -> list[str]:
    """Names of the live actors of a deployment."""
    import ray

    return sorted(str(entry["name"]) for entry in ray.util.list_named_actors(all_namespaces=True) if entry["namespace"] == namespace)


def find_actor(name: str, namespace: str) -> Any | None:
    """A handle to a live named actor, or None."""
    import ray

    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


def placement_group_names(namespace: str) -> list[str]:
    """Names of the deployment's placement groups that are not removed; they carry the namespace as a prefix."""
    from ray.util import placement_group_table

    live = [str(entry["name"]) for entry in placement_group_table().values() if entry["state"] != "REMOVED"]
    return sorted(name for name in live if name.startswith(namespace + "/"))


def remove_placement_group_named(name: str) -> None:
    from ray.util import get_placement_group, remove_placement_group

    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(name))


def kill_actor(name: str, namespace: str) -> None:
    import ray

    handle = find_actor(name, namespace)
    if handle is not None:
        ray.kill(handle, no_restart=True)


def remove_everything(namespace: str, *, keep: tuple[str, ...] = (), timeout_s: float = 20.0) -> None:
    """Kills every actor and removes every placement group of the deployment. DeploymentError names what is left at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        actors = [name for name in actor_names(namespace) if name not in keep]
        groups = placement_group_names(namespace)
        if not actors and not groups:
            return
        if time.monotonic() > deadline:
            raise DeploymentError(f"could not remove {', '.join(actors + groups)} of {namespace} within {timeout_s:.0f} s")
        # The controller goes first: it would bring back what it misses.
        for name in sorted(actors, key=lambda name: name != CONTROLLER):
            kill_actor(name, namespace)
        for name in groups:
            remove_placement_group_named(name)
        time.sleep(0.05)
