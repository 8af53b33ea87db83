"""A deployment as its driver sees it: bring it up, wait with progress, keep it, take it down.

The driver owns the deployment unless it detaches: it says "alive" every few seconds, and a controller that no longer hears it removes
everything. So a killed driver leaves nothing behind, on its own Ray or on a shared one.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from runtime.client import InferenceClient, RemoteError
from runtime.config import ServeSettings
from runtime.controller.ray_cluster import CONTROLLER, RaySession, actor_names, find_actor, ray_session, remove_everything
from runtime.controller.spec import DeploymentReport, DeploymentSpec, namespace_of
from runtime.errors import DeploymentError
from runtime.routing.types import Membership

log = logging.getLogger(__name__)

OWNER_TIMEOUT_S = 30.0
OWNER_BEAT_S = 3.0
SHUTDOWN_TIMEOUT_S = 45.0
POLL_S = 0.1


@dataclass
class Deployment:
    """Handle on a running controller."""

    spec: DeploymentSpec
    session: RaySession
    _controller: Any
    _closed: threading.Event = field(default_factory=threading.Event)

    def report(self, timeout_s: float = 10.0) -> DeploymentReport:
        report: DeploymentReport = self._ask("report", timeout_s)
        return report

    def membership(self, timeout_s: float = 10.0) -> Membership:
        membership: Membership = self._ask("membership", timeout_s)
        return membership

    def _ask(self, method: str, timeout_s: float, *arguments: object) -> Any:
        import ray

        try:
            return ray.get(getattr(self._controller, method).remote(*arguments), timeout=timeout_s)
        except ray.exceptions.RayError as error:
            raise DeploymentError(f"the controller of {self.spec.namespace} does not answer: {type(error).__name__}") from error

    def wait_ready(self, timeout_s: float, on_progress: Callable[[DeploymentReport], None] = lambda report: None) -> DeploymentReport:
        """Returns once every replica serves (and the front door listens). DeploymentError with the reason when that cannot be."""
        deadline = time.monotonic() + timeout_s
        while True:
            report = self.report()
            on_progress(report)
            if report.permanent:
                raise DeploymentError(report.problem)
            if report.replicas and all(replica.state == "ready" for replica in report.replicas) and self._is_reachable(report):
                return report
            if time.monotonic() > deadline:
                raise DeploymentError(f"not ready after {timeout_s:.0f} s: {report.problem or _describe(report)}")
            time.sleep(POLL_S)

    def _is_reachable(self, report: DeploymentReport) -> bool:
        """Whether the front door is connected to every replica; where there is to be none, the driver connects by itself."""
        if not report.endpoint:
            return not self.spec.front_doors
        try:
            with InferenceClient(report.endpoint, api_key=self.spec.secret) as client:
                rows = client.status(timeout_s=5.0).replicas
        except RemoteError:
            return False
        return len(rows) == self.spec.settings.replicas and all(row.state == "ready" for row in rows)

    def metrics_address(self, endpoint: str) -> str:
        """HOST:PORT of the front door's Prometheus endpoint; empty where there is none. RemoteError when it does not answer."""
        with InferenceClient(endpoint, api_key=self.spec.secret) as client:
            return client.status(timeout_s=5.0).front_door.metrics_address

    def keep_alive(self) -> None:
        """Until `close`, tells the controller that its owner lives."""

        def beat() -> None:
            while not self._closed.wait(OWNER_BEAT_S):
                self._controller.owner_is_alive.remote()

        threading.Thread(target=beat, name="owner-beat", daemon=True).start()

    def close(self) -> None:
        """Drains and removes everything, and makes sure that it is gone."""
        self._closed.set()
        with contextlib.suppress(DeploymentError):  # a dead controller cannot drain; removal by name needs none
            self._ask("shutdown", SHUTDOWN_TIMEOUT_S, SHUTDOWN_TIMEOUT_S - 5.0)
        remove_everything(self.spec.namespace)


def _describe(report: DeploymentReport) -> str:
    return (
        "; ".join(f"{replica.replica_id} is {replica.state} {replica.detail}".strip() for replica in report.replicas) or "nothing started"
    )


@contextlib.contextmanager
def deployed(settings: ServeSettings, *, front_doors: bool = True) -> Iterator[Deployment]:
    """Starts a deployment that this process owns; it is gone when the block ends, however it ends."""
    namespace = namespace_of(settings.deployment)
    with ray_session(namespace) as session:
        deployment = launch(settings, session, front_doors=front_doors, owned=True)
        try:
            deployment.keep_alive()
            yield deployment
        finally:
            with uninterrupted():
                deployment.close()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave half a deployment behind; removal has deadlines of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def launch(settings: ServeSettings, session: RaySession, *, front_doors: bool, owned: bool) -> Deployment:
    """Creates the controller; it creates the rest. DeploymentError when one of that name runs already.

    An owner's controller stays on the owner's node. Elsewhere it could be on a node that dies, and Ray takes 15 s to call a node dead; it
    restarts the controller of a detached deployment then.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from runtime.controller.controller import Controller

    namespace = namespace_of(settings.deployment)
    if actor_names(namespace):
        raise DeploymentError(
            f"a deployment named {settings.deployment!r} runs on this cluster; end it with mobula shutdown, or choose another --deployment"
        )
    spec = DeploymentSpec(
        settings=settings,
        secret=secrets.token_hex(16),
        front_doors=front_doors,
        front_door_node=session.node_id,
        owner_timeout_s=OWNER_TIMEOUT_S if owned else None,
        use_gpu=settings.device != "cpu" and session.num_gpus > 0,
    )
    options: dict[str, Any] = {
        "name": CONTROLLER,
        "namespace": namespace,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_concurrency": 8,
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(session.node_id, soft=not owned),
    }
    controller = ray.remote(Controller).options(**options).remote(spec)
    return Deployment(spec, session, controller)


def attach(deployment: str, session: RaySession) -> Deployment:
    """A handle on a deployment that runs already. DeploymentError when there is none of that name."""
    import ray

    namespace = namespace_of(deployment)
    controller = find_actor(CONTROLLER, namespace)
    if controller is None:
        raise DeploymentError(f"no deployment named {deployment!r} runs on the Ray cluster at {session.address}")
    spec: DeploymentSpec = ray.get(controller.spec.remote(), timeout=10.0)
    return Deployment(spec, session, controller)
