"""The nouns of a request, shared by the front door, the router, the engine and offline use. Each says who writes it."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from workers.step import SamplingSettings

TIERS = ("pages", "dram", "disk", "peer")  # where a reused prompt token came from


class FinishReason(enum.StrEnum):
    STOP = "stop"  # eos, a stop token or a stop string
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class StopConditions:
    """What ends an output. The engine reads the first three, `text.stop` the last."""

    max_tokens: int
    end_token_ids: frozenset[int]  # eos (unless ignored) and stop_token_ids
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """Written by `frontdoor.validate`; nothing later judges input again. Immutable."""

    request_id: str
    prompt_token_ids: array[int]  # typecode "I", at least one
    sampling: SamplingSettings
    stop: StopConditions
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None  # CLOCK_MONOTONIC of the process that holds the request
    output_token_ids: array[int] = field(default_factory=lambda: array("I"))  # of a resumed request: already produced elsewhere
    pin_ttl_s: float = 0.0  # how long the store is to keep the prompt's full blocks; 0: no longer than others


class CachedTokens(NamedTuple):
    """Prompt tokens that were not computed, by tier, as of a request's first admission. Written by the engine."""

    pages: int = 0
    dram: int = 0
    disk: int = 0
    peer: int = 0

    @property
    def total(self) -> int:
        return sum(self)


class NotReused(enum.StrEnum):
    """Why a prompt token was computed, as far as the replica that computed it knows."""

    COLD = "cold"  # neither this replica nor its store has seen the block lately
    EVICTED = "evicted"  # this replica or its store has held the block lately, and neither its pages nor the store do any more
    OTHER_NAMESPACE = "other_namespace"  # the prompt's first block was seen here under another tenant or salt only; how far the prompts
    # agree behind it is not looked at
    PARTIAL_BLOCK = "partial_block"  # behind the last full block; the last prompt token always is
    SCORED = "scored"  # its logprobs, or those of a position before it, were asked for
    STORE_UNAVAILABLE = "store_unavailable"  # the store could not be asked, did not answer in time, or did not deliver
    CHEAPER_TO_COMPUTE = "cheaper_to_compute"  # loading it would have taken longer
    CACHING_OFF = "caching_off"


class Receipt(NamedTuple):
    """What a prompt cost, as of first admission. Written by the engine; all zero for a request that was never admitted."""

    num_computed_tokens: int = 0  # prompt tokens that were not reused
    bytes_loaded: int = 0  # of blocks that were read from the store for this request
    not_reused: dict[str, int] = {}  # noqa: RUF012 - never changed. NotReused -> prompt tokens; sums up to num_computed_tokens


class Timings(NamedTuple):
    """Seconds, written by the engine (`queue_s`, `store_wait_s`) and the front door (the others)."""

    queue_s: float = 0.0
    store_wait_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0


class PinOutcome(enum.StrEnum):
    """What became of a request's wish for a pin, as of its arrival at the engine. Written by the engine."""

    TAKEN = "taken"  # the store is asked for it once it has the blocks
    NO_STORE = "no_store"
    TOO_MANY = "too_many"  # wishes are under way
    TOO_SHORT = "too_short"  # the prompt has no full block


def pin_owner(tenant: str) -> str:
    """Whose a tenant's pins are, for the stores. Never empty, which to a store means everybody."""
    return f"tenant:{tenant}"
