"""Stay where the prefix is, until that replica has too much to compute."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.routing.policies.least_loaded import load_tokens
from runtime.routing.types import Candidate, PolicySettings, RoutingContext


class PrefixAffinity:
    needs_prefixes = True

    def __init__(self, settings: PolicySettings) -> None:
        self._limit_tokens = settings.affinity_limit_tokens

    def choose(self, context: RoutingContext, candidates: Sequence[Candidate]) -> Candidate:
        """The longest prefix; among equals, and where the limit is passed, the least loaded.

        The limit counts uncached tokens: any number of requests may share a cached prefix on one replica while their tails are short.
        """
        longest = max(candidate.prefix_tokens for candidate in candidates)
        if longest == 0:
            return min(candidates, key=load_tokens)
        holders = [candidate for candidate in candidates if candidate.prefix_tokens == longest]
        holder = min(holders, key=load_tokens)
        if holder.queued_tokens + context.num_prompt_tokens - longest <= self._limit_tokens:
            return holder
        return min(candidates, key=load_tokens)
