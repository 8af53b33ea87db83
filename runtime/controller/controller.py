"""The controller: compares what is desired with what is there, and acts on the difference.

    one thread, one pass every PASS_S     adopt (first pass) -> nodes -> replicas -> membership -> owner
    gated by                              nothing: each pass only looks at answers that have arrived

It is a detached actor that Ray restarts. A restarted one lists the namespace and adopts what is alive before it creates anything.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from runtime.controller import placement
from runtime.controller.ray_cluster import CONTROLLER, actor_names, find_actor, kill_actor, remove_everything
from runtime.controller.remote_call import RemoteCall, RemoteCallFailed
from runtime.controller.replica import Replica, ReplicaPhase
from runtime.controller.spec import DeploymentReport, DeploymentSpec, NodeState
from runtime.engine.config import EngineConfig
from runtime.frontdoor.config import FrontDoorConfig
from runtime.routing.types import Membership, StoreMember

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

PASS_S = 0.1
PROBE_EVERY_S = 0.5
MEMBERSHIP_REPEAT_S = 2.0  # a front door that missed a push hears of it again
NODE_ACTOR_TIMEOUT_S = 60.0
RETRY_DELAYS_S = (0.0, 1.0, 5.0, 15.0)  # between attempts to replace a lost replica; the last one repeats
DRAIN_S = 5.0


class NodeActor:
    """A store or a front door: one per node, found again by name, made again when lost."""

    def __init__(self, name: str, namespace: str, create: Callable[[], Any]) -> None:
        self.node_id = self.address = self.peer_address = ""
        self.state = "starting"
        self.problem = ""
        self._name, self._namespace, self._create = name, namespace, create
        self._handle: Any = None
        self._call: RemoteCall[NodeState] | None = None
        self._next_look_s = 0.0

    def advance(self, now_s: float) -> None:
        if self._call is None:
            if now_s >= self._next_look_s:
                self._handle = find_actor(self._name, self._namespace) or self._create()
                self._call = RemoteCall(self._handle.describe.remote(), self._name, NODE_ACTOR_TIMEOUT_S)
            return
        try:
            answer = self._call.poll()
        except RemoteCallFailed as error:
            self.state, self.problem, self._call, self._next_look_s = "lost", str(error), None, now_s + 1.0
            kill_actor(self._name, self._namespace)
            return
        if answer is not None:
            self.node_id, self.address, self.state, self.peer_address = answer
            self.problem, self._call, self._next_look_s = "", None, now_s + PROBE_EVERY_S

    def call(self, method: str, *arguments: object) -> Any:
        return getattr(self._handle, method).remote(*arguments) if self._handle is not None and self.address else None


class Controller:
    """Runs in its actor; every public method only reads or sets a field, so it answers at once."""

    def __init__(self, spec: DeploymentSpec) -> None:
        logging.basicConfig(level=logging.INFO)
        self._spec = spec
        self._replicas: dict[str, Replica] = {}
        self._stores: dict[str, NodeActor] = {}
        self._front_doors: dict[str, NodeActor] = {}
        self._membership = Membership(int(time.time() * 1000))  # above every version of a former controller
        self._pushed_s = 0.0
        self._num_created = int(time.time())  # replica ids keep growing over restarts of the controller
        self._num_losses = 0
        self._next_create_s = 0.0
        self._problem = ""
        self._permanent = False
        self._owner_seen_s = time.monotonic()
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="reconcile", daemon=True).start()

    # Answers to the driver.

    def report(self) -> DeploymentReport:
        endpoint = self._front_doors.get(self._spec.front_door_node)
        return DeploymentReport(
            replicas=[replica.report for replica in list(self._replicas.values())],
            endpoint=endpoint.address if endpoint and endpoint.state == "ready" else "",
            num_stores_starting=sum(store.state != "ready" for store in list(self._stores.values())),
            problem=self._problem,
            permanent=self._permanent,
        )

    def membership(self) -> Membership:
        return self._membership

    def spec(self) -> DeploymentSpec:
        return self._spec

    def owner_is_alive(self) -> None:
        self._owner_seen_s = time.monotonic()

    def shutdown(self, timeout_s: float) -> bool:
        """Drains and removes everything but this actor. True when all is gone."""
        self._stopping.set()
        return self._stopped.wait(timeout_s)

    # The loop.

    def _run(self) -> None:
        self._adopt()
        while not self._stopping.is_set():
            try:
                self._reconcile(time.monotonic())
            except Exception as error:
                self._problem = f"{type(error).__name__}: {error}"
                log.exception("reconciling failed")
            self._stopping.wait(PASS_S)
        self._drain()
        remove_everything(self._spec.namespace, keep=(CONTROLLER,))
        self._stopped.set()

    def _reconcile(self, now_s: float) -> None:
        self._advance_nodes(now_s)
        self._advance_replicas(now_s)
        self._publish(now_s)
        timeout_s = self._spec.owner_timeout_s
        if timeout_s is not None and now_s - self._owner_seen_s > timeout_s:
            log.warning("the owner has been silent for %.0f s: removing the deployment", timeout_s)
            threading.Thread(target=self._leave, name="leave", daemon=True).start()
            self._stopping.set()

    def _leave(self) -> None:
        self._stopped.wait(60.0)
        kill_actor(CONTROLLER, self._spec.namespace)

    def _adopt(self) -> None:
        for name in actor_names(self._spec.namespace):
            if name.startswith("engine-"):
                replica = self._new_replica(name.removeprefix("engine-"))
                replica.adopt()
                log.info("adopted %s", name)

    def _advance_nodes(self, now_s: float) -> None:
        settings = self._spec.settings
        for node_id in placement.live_nodes():
            if settings.store_memory and node_id not in self._stores:
                self._stores[node_id] = self._node_actor("store", node_id, placement.create_store, settings.store_config(self._spec.secret))
            if self._spec.front_doors and node_id not in self._front_doors:
                self._front_doors[node_id] = self._node_actor("frontdoor", node_id, placement.create_front_door, self._door_config(node_id))
        for actor in (*self._stores.values(), *self._front_doors.values()):
            actor.advance(now_s)
            self._problem = actor.problem or self._problem

    def _node_actor(self, kind: str, node_id: str, create: Callable[[DeploymentSpec, str, Any], Any], config: Any) -> NodeActor:
        return NodeActor(f"{kind}-{node_id[:12]}", self._spec.namespace, lambda: create(self._spec, node_id, config))

    def _door_config(self, node_id: str) -> FrontDoorConfig:
        settings = self._spec.settings
        binds_ports = node_id == self._spec.front_door_node  # the others take any that are free
        return FrontDoorConfig(
            model=settings.model,
            model_names=settings.model_names,
            host=settings.host,
            port=settings.port if binds_ports else 0,
            metrics_port=settings.metrics_port if binds_ports or settings.metrics_port is None else 0,
            api_keys=settings.api_keys,
            policy=settings.policy,
            secret=self._spec.secret,
            max_message_bytes=settings.max_message_size,
        )

    def _advance_replicas(self, now_s: float) -> None:
        for replica in list(self._replicas.values()):
            replica.advance()
            if replica.phase is ReplicaPhase.LOST:
                log.warning("replica %s lost: %s", replica.replica_id, replica.detail)
                self._problem, self._permanent = replica.detail, self._permanent or replica.permanent
                replica.remove()
                del self._replicas[replica.replica_id]
                self._next_create_s = now_s + RETRY_DELAYS_S[min(self._num_losses, len(RETRY_DELAYS_S) - 1)]
                self._num_losses += 1
            elif replica.phase is ReplicaPhase.READY:
                self._num_losses = 0
        if self._permanent or now_s < self._next_create_s:
            return
        while len(self._replicas) < self._spec.settings.replicas:
            self._num_created += 1
            self._new_replica(f"r{self._num_created:x}").start()

    def _new_replica(self, replica_id: str) -> Replica:
        settings = self._spec.settings
        config = EngineConfig(
            replica_id=replica_id,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_prompt_tokens_beside_outputs=settings.max_prompt_tokens_beside_outputs,
            max_queued_requests=settings.max_queued_requests,
            max_queued_tokens=settings.max_queued_tokens,
        )
        replica = self._replicas[replica_id] = Replica(self._spec, replica_id, config, self._store_address_of)
        return replica

    def _store_address_of(self, node_id: str) -> str | None:
        """The store of a node; "" where there is to be none; None while it is still starting."""
        if not self._spec.settings.store_memory:
            return ""
        store = self._stores.get(node_id)
        return store.address if store and store.address else None

    def _publish(self, now_s: float) -> None:
        replicas = tuple(replica.member for replica in self._replicas.values())
        stores = tuple(StoreMember(node_id, store.address, store.state) for node_id, store in self._stores.items())
        changed = (replicas, stores) != (self._membership.replicas, self._membership.stores)
        if changed:
            self._membership = Membership(self._membership.version + 1, replicas, stores)
        if changed or now_s - self._pushed_s > MEMBERSHIP_REPEAT_S:
            self._pushed_s = now_s
            for door in self._front_doors.values():
                door.call("set_membership", self._membership)
            peers = sorted(filter(None, (store.peer_address for store in self._stores.values())))
            for store in self._stores.values() if len(self._stores) > 1 else ():
                store.call("set_peers", peers)

    def _drain(self) -> None:
        """New requests are refused, running ones get DRAIN_S, then engines and stores close what they own."""
        import ray

        for batch in (
            [door.call("stop", DRAIN_S) for door in self._front_doors.values()],
            [replica.request_stop() for replica in self._replicas.values()],
            [store.call("stop") for store in self._stores.values()],
        ):
            references = [reference for reference in batch if reference is not None]
            if references:
                ray.wait(references, num_returns=len(references), timeout=DRAIN_S + 5.0)
