"""Settings of one front door."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.api_keys import ApiKeys


@dataclass(frozen=True, slots=True)
class FrontDoorConfig:
    model: str  # folder with config.json
    model_names: tuple[str, ...] = ()  # as clients spell it, the first one first; empty: the folder's name
    host: str = "127.0.0.1"
    port: int = 0  # 0 picks one
    metrics_port: int | None = None  # of the Prometheus endpoint on `host`; None: none, 0 picks one
    api_keys: ApiKeys = ()  # empty: callers are not told apart
    policy: str = "prefix_affinity"  # key of runtime.routing.policies.POLICIES
    secret: str = ""  # of the cluster's internal channels
    max_model_len: int | None = None  # None: what the checkpoint and the replicas say
    max_message_bytes: int = 16 << 20
    max_live_requests: int = 4096
    write_timeout_s: float = 120.0  # a client that takes nothing from its stream for longer is given up
    keepalive_s: float = 20.0  # how often a connection in use is probed; one that does not answer for as long again is broken
    affinity_limit_tokens: int = 16384  # see runtime.routing.types.PolicySettings
    healthy_for_s: float = 10.0  # a replica that answered nothing for longer does not count as serving
    healthy_step_s: float = 60.0  # a replica whose ranks have been in one step for longer does not either
    silence_limit_s: float = 15.0  # a replica that answered nothing for longer is lost
    status_timeout_s: float = 1.0  # what GetStatus waits for a replica or store
