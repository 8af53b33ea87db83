"""The nouns of routing: who is in the deployment, and what a policy is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

READY = "ready"
DRAINING = "draining"


class ReplicaMember(NamedTuple):
    """One engine, as the controller knows it."""

    replica_id: str
    address: str  # "host:port" of the engine channel; empty until there is one
    state: str  # "loading", "ready", "draining" or "lost"
    detail: str = ""  # progress while loading, the reason when lost
    tensor_parallel_size: int = 1


class StoreMember(NamedTuple):
    """One node's cache store, as the controller knows it."""

    node_id: str
    address: str  # "unix:/path" or "host:port"
    state: str = READY  # "ready", "starting" or "lost"


class Membership(NamedTuple):
    """Written by the controller; a front door ignores one older than it has."""

    version: int
    replicas: tuple[ReplicaMember, ...] = ()
    stores: tuple[StoreMember, ...] = ()


class RoutingContext(NamedTuple):
    """The request, as far as its place matters."""

    num_prompt_tokens: int


class Candidate(NamedTuple):
    """A replica that can take the request now. Counts cover what its engine last reported and what was routed to it since."""

    replica_id: str
    num_requests: int  # running, waiting and on their way
    queued_tokens: int  # prompt tokens in flight that are neither computed nor cached
    prefix_tokens: int = 0  # leading prompt tokens that it has been sent before; 0 for policies that do not ask


class PolicySettings(NamedTuple):
    affinity_limit_tokens: int = 16384  # queued tokens up to which a request stays with its prefix: a few steps of prefill


class Policy(Protocol):
    """Chooses and holds no resources: the router alone reserves and releases."""

    needs_prefixes: bool  # whether `prefix_tokens` is looked up

    def choose(self, context: RoutingContext, candidates: Sequence[Candidate]) -> Candidate:
        """One of `candidates`, of which there is at least one."""
        ...
