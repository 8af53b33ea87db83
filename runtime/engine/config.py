"""The settings of one engine. Frozen: what is learned at run time (pages, root, epoch) is state, not config."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import NamedTuple


def new_incarnation() -> str:
    return uuid.uuid4().hex


class StepLimits(NamedTuple):
    """What one step may hold: what the settings ask for, within what the group takes."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_prompt_tokens_beside_outputs: int

    @property
    def max_rows(self) -> int:
        """Every row may need a token of every step, so no more rows than the token budget."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes are in tokens, blocks or requests as named. ValueError for settings that could never serve a request."""

    replica_id: str = "replica"
    incarnation: str = field(default_factory=new_incarnation)  # new for every start of an engine

    # Steps; the group's own limits hold besides
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # None: the group's
    max_prompt_tokens_beside_outputs: int | None = None  # of a step that gives a running request a token, so that no prompt holds those
    # up; None: the group's
    pipeline_depth: int = 2  # steps launched before the result of the first is needed
    prefix_caching: bool = True  # False: every prompt token is computed

    # Bounds of the queue; a request that would pass them is refused with Overloaded
    max_queued_requests: int = 4096
    max_queued_tokens: int = 4_000_000
    retry_after_ms: int = 500

    # The root of block keys
    numerics: str = "fast"
    weight_quantisation: str = ""

    # Loads from the store
    load_timeout_s: float = 2.0  # a request waits no longer than this for the store, then it computes
    lookup_ahead: int = 64  # waiting requests whose prefix is looked up; fewer than the port's bound on open questions
    max_loading_requests: int = 8
    max_loading_blocks: int = 512
    first_load_blocks: int = 128  # acquired with the first waiting request's lookup, so that their copies run while the next are acquired,
    # twice as many each time; with the second one's lookup a half, the third one's a third
    early_step_s: float = 0.025  # a lone request's step is sent ahead of the last blocks that it waits for, when these take no longer
    unasked_compute_s: float = 0.025  # less than a step's worth of tokens behind a prefix at hand: the store is not asked for them, where
    # at the replica's rate they take no longer than this
    unasked_idle_s: float = 0.01  # so much of any prompt, while nothing else runs or waits: bringing it would take longer

    # Single flight: how long a request waits for blocks that another replica is computing, then it computes them itself
    single_flight_timeout_s: float = 1.0  # per 1,000 tokens, and for fewer; 0: not at all
    single_flight_max_s: float = 30.0
    single_flight_poll_s: float = 0.005  # first time between two looks at the store; doubles up to 16 times that

    # Offers to the store
    max_saving_blocks: int = 64  # pages pinned by copies to the store
    offer_batch_blocks: int = 32
    max_offer_attempts: int = 4
    offer_retry_s: float = 0.25

    # Pins: prompts that the store is asked to keep
    max_pin_wishes: int = 256  # not yet answered; further ones are ignored
    pin_timeout_s: float = 30.0  # from the prompt's end until its blocks must be stored
    pin_retry_s: float = 0.02  # first time between two attempts; doubles
    pin_wait_s: float = 1.0  # for blocks that the store has on disk or at a peer

    # Leases and copies. A copy must end long before the store may take the slot back.
    lease_ttl_s: float = 60.0
    copy_timeout_s: float = 15.0

    # Waits of the loop
    idle_poll_s: float = 1.0
    stop_timeout_s: float = 5.0  # for copies in flight when the engine stops

    def __post_init__(self) -> None:
        if self.pipeline_depth not in (1, 2):
            raise ValueError(f"pipeline_depth must be 1 or 2, not {self.pipeline_depth}")
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_prompt_tokens_beside_outputs",
            "max_queued_requests",
            "max_queued_tokens",
            "max_loading_requests",
            "first_load_blocks",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.single_flight_timeout_s < 0 or self.single_flight_max_s < 0 or self.single_flight_poll_s <= 0:
            raise ValueError("single_flight_timeout_s, single_flight_max_s: must not be negative; single_flight_poll_s: must be positive")
        if self.copy_timeout_s * 2 > self.lease_ttl_s:
            raise ValueError(f"lease_ttl_s ({self.lease_ttl_s}) must be at least twice copy_timeout_s ({self.copy_timeout_s})")

    def single_flight_limit_s(self, num_tokens: int) -> float:
        """How long to wait for so many tokens of another replica."""
        return min(self.single_flight_max_s, self.single_flight_timeout_s * max(1.0, num_tokens / 1000))

    def step_limits(self, max_num_seqs: int, max_num_batched_tokens: int, max_prompt_tokens_beside_outputs: int) -> StepLimits:
        """Within those of a group."""
        return StepLimits(
            min(self.max_num_seqs, max_num_seqs),
            min(self.max_num_batched_tokens or max_num_batched_tokens, max_num_batched_tokens),
            self.max_prompt_tokens_beside_outputs or max_prompt_tokens_beside_outputs,
        )
