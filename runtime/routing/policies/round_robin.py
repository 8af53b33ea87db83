"""Every replica in turn."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.routing.types import Candidate, PolicySettings, RoutingContext


class RoundRobin:
    needs_prefixes = False

    def __init__(self, settings: PolicySettings) -> None:
        self._last = ""

    def choose(self, context: RoutingContext, candidates: Sequence[Candidate]) -> Candidate:
        """The next replica by name: replicas that come and go do not shift the turns of the others."""
        in_turn = sorted(candidates, key=lambda candidate: candidate.replica_id)
        chosen = next((candidate for candidate in in_turn if candidate.replica_id > self._last), in_turn[0])
        self._last = chosen.replica_id
        return chosen
