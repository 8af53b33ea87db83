"""What is deployed, and what its parts say of themselves. Plain data: it travels through Ray's actor arguments."""

from __future__ import annotations

from typing import NamedTuple

from runtime.config import ServeSettings


class DeploymentSpec(NamedTuple):
    """The constructor argument of the controller: a restarted one finds here all it needs to adopt what runs."""

    settings: ServeSettings
    secret: str
    front_doors: bool  # False: offline use, the driver talks to the engines itself
    front_door_node: str  # the node whose front door binds the port that was asked for
    owner_timeout_s: float | None  # remove everything when the owner has been silent for so long; None: detached
    use_gpu: bool

    @property
    def namespace(self) -> str:
        return namespace_of(self.settings.deployment)


def namespace_of(deployment: str) -> str:
    return f"mobula.{deployment}"


class NodeState(NamedTuple):
    """What a node's store or front door answers to a probe."""

    node_id: str
    address: str
    state: str
    peer_address: str = ""  # of a store: where stores of other nodes pull from


class Progress(NamedTuple):
    """How far one rank is with one phase of its start."""

    rank: int
    phase: str
    done: int
    total: int


class EngineState(NamedTuple):
    """What an engine actor answers to a probe."""

    phase: str  # "waiting" for its ranks, "loading", "ready", "failed" or "stopped"
    detail: str
    address: str  # of the engine channel, once ready
    node_id: str
    progress: list[Progress]
    permanent: bool = False  # a failure that another attempt cannot mend (the checkpoint, the settings)


class ReplicaReport(NamedTuple):
    replica_id: str
    state: str  # "placing", "loading", "ready", "draining" or "lost"
    detail: str
    progress: list[Progress]
    permanent: bool


class DeploymentReport(NamedTuple):
    """What a driver needs to show progress and to know when to stop waiting."""

    replicas: list[ReplicaReport]
    endpoint: str  # HOST:PORT of the front door that binds the port asked for; empty until it listens
    num_stores_starting: int
    problem: str  # the latest reason why something could not be started
    permanent: bool  # and another attempt would meet it again
