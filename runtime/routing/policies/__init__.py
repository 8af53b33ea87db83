"""The table of routing policies. A new one is one file and one line here; tests/contracts/test_policies.py covers it by itself."""

from __future__ import annotations

import importlib

from runtime.errors import DeploymentError
from runtime.routing.types import Policy, PolicySettings

POLICIES: dict[str, str] = {
    "round_robin": "runtime.routing.policies.round_robin:RoundRobin",
    "least_loaded": "runtime.routing.policies.least_loaded:LeastLoaded",
    "prefix_affinity": "runtime.routing.policies.prefix_affinity:PrefixAffinity",
}


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """DeploymentError for a name that is not in the table."""
    if name not in POLICIES:
        raise DeploymentError(f"unknown routing policy {name!r}; choose one of {', '.join(sorted(POLICIES))}")
    module, _, attribute = POLICIES[name].partition(":")
    policy: Policy = getattr(importlib.import_module(module), attribute)(settings or PolicySettings())
    return policy
