"""The replica with the least work ahead of it."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.routing.types import Candidate, PolicySettings, RoutingContext

REQUEST_WEIGHT_TOKENS = 64  # a request in the batch slows the others about as much as this many queued prompt tokens


def load_tokens(candidate: Candidate) -> tuple[int, str]:
    """Sort key: the work ahead in tokens, then the name, so that equal replicas are told apart the same way everywhere."""
    return candidate.queued_tokens + REQUEST_WEIGHT_TOKENS * candidate.num_requests, candidate.replica_id


class LeastLoaded:
    needs_prefixes = False

    def __init__(self, settings: PolicySettings) -> None:
        pass

    def choose(self, context: RoutingContext, candidates: Sequence[Candidate]) -> Candidate:
        return min(candidates, key=load_tokens)
