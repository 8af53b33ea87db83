"""The nouns of the engine: a request as it arrives, and as it lives. Every mutable field names its writer.

submit --> WAITING --admitted by the scheduler--> RUNNING --end found by outputs, abort, deadline--> FINISHED
              ^                                      |
              +------- PREEMPTED <--out of pages-----+      (back to the head of the queue, admitted again as a new row)
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from cache_store.key_chains import KeyChains
from cache_store.keys import BlockKey, chain_keys
from runtime.request import CachedTokens, PinOutcome, Receipt
from workers.step import SamplingSettings, StepRow

RequestKey = tuple[int, str]  # (stream, request id): ids are scoped by the front door's stream


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a front door sends. `output` holds tokens already produced elsewhere; `max_tokens` counts them too."""

    stream: int
    request_id: str
    prompt: array[int]  # typecode "I", at least one
    sampling: SamplingSettings
    max_tokens: int
    end_token_ids: frozenset[int] = frozenset()
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None  # CLOCK_MONOTONIC
    output: array[int] = field(default_factory=lambda: array("I"))
    pin_ttl_s: float = 0.0  # how long the store is to keep the prompt's full blocks; 0: no longer than others

    @property
    def key(self) -> RequestKey:
        return (self.stream, self.request_id)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)


class Phase(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class LoadGate(enum.Enum):
    """What the store means for the admission of a waiting request."""

    OPEN = "open"  # nothing to wait for
    WAIT = "wait"  # the store is being asked or read: others may overtake
    NO_ROOM = "no room"  # its load starts once pages are free: nobody may overtake


class StoreVerdict(NamedTuple):
    """What the store said of the blocks that it did not offer."""

    first: int  # index of the first of them
    num_cheaper: int  # of the leading ones, which it has
    is_evicted: bool  # whether it has had the one behind those


class LiveRequest:
    """One request from arrival to end.

    Two counts run ahead of the results: `num_known` and `num_computed` are what will be true once every launched step is done.
    `tokens` and `num_confirmed` are what results have shown.
    """

    __slots__ = (
        "_chains",
        "admitted_s",
        "arrival",
        "arrived_s",
        "bytes_loaded",
        "cached",
        "decode_row",
        "first_output_sent",
        "held_pages",
        "keys",
        "last_step",
        "limit",
        "load_gate",
        "load_tiers",
        "num_computed",
        "num_confirmed",
        "num_in_flight",
        "num_known",
        "num_positions",
        "num_prompt",
        "num_prompt_scored",
        "num_published",
        "num_void",
        "pages",
        "phase",
        "pin",
        "plan_limit",
        "receipt",
        "request",
        "root",
        "row_id",
        "store_failed",
        "store_verdict",
        "store_wait_s",
        "tokens",
        "waits_for",
    )

    def __init__(
        self, request: EngineRequest, arrival: int, arrived_s: float, max_model_len: int, root: BlockKey, chains: KeyChains
    ) -> None:
        self.request = request
        self.arrival = arrival  # order of arrival; the engine
        self.arrived_s = arrived_s
        self.num_prompt = len(request.prompt)
        self.tokens: array[int] = request.prompt + request.output  # grown by outputs
        self.limit = min(self.num_prompt + request.max_tokens, max_model_len)  # tokens that count, prompt included
        self.plan_limit = max(self.limit, self.num_prompt + 1)  # a step that computes the last prompt token samples in any case
        self.root = root  # the engine
        self.keys: list[BlockKey] = []  # of the leading full blocks; extend_keys
        self._chains = chains

        self.phase = Phase.WAITING  # the scheduler
        self.row_id = 0  # the scheduler; new for every admission
        self.pages: list[int] = []  # the scheduler
        self.num_positions = 0  # that `pages` have room for; the scheduler
        self.num_known = len(self.tokens)  # the scheduler
        self.num_computed = 0  # the scheduler
        self.num_in_flight = 0  # launched steps whose results are out; scheduler up, outputs down
        self.last_step = 0  # sequence of the last step that names the row; the scheduler
        self.decode_row = StepRow(0, 1, 0, 0, [])  # the scheduler; the same tuple for every step that appends no page
        self.waits_for: BlockKey | None = None  # a key that a running row is about to publish; the scheduler
        self.cached: CachedTokens | None = None  # as of first admission; the scheduler
        self.receipt: Receipt | None = None  # as of first admission; the scheduler
        self.admitted_s: float | None = None  # of first admission; the engine

        self.num_confirmed = 0  # positions whose keys and values are in `pages` by a result; outputs (the scheduler at admission)
        self.num_published = 0  # leading blocks offered to the index; outputs (the scheduler at admission)
        self.num_prompt_scored = 0  # prompt positions whose logprobs, where asked for, are delivered; outputs
        self.first_output_sent = False  # outputs
        self.num_void = 0  # of its next results, how many count for nothing: they come of pages that could not be loaded; loads, outputs

        self.load_gate = LoadGate.OPEN  # kv_loads
        self.load_tiers: dict[int, str] = {}  # block index -> tier it was loaded from; kv_loads
        self.held_pages: list[int] = []  # of leading blocks, pinned while waiting for admission; kv_loads, ended by the scheduler
        self.store_wait_s = 0.0  # kv_loads
        self.store_failed = False  # it could not say or deliver what it has of the prefix; kv_loads
        self.store_verdict: StoreVerdict | None = None  # of the latest lookup; kv_loads
        self.bytes_loaded = 0  # of blocks read for this request; kv_loads
        self.pin: PinOutcome | None = None  # where one was asked for; kv_pins

    @property
    def key(self) -> RequestKey:
        return self.request.key

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    def extend_keys(self, block_size: int) -> list[BlockKey]:
        """Keys of all full blocks of the known tokens. Each block is hashed once."""
        keys, tokens = self.keys, self.tokens
        if len(keys) < len(tokens) // block_size:
            if keys:
                keys += chain_keys(keys[-1], tokens[len(keys) * block_size :], block_size)
            else:
                self.keys = self._chains.keys(self.root, tokens, block_size)
        return self.keys

    def num_reusable_blocks(self, block_size: int) -> int:
        """Leading full blocks that may come from a cache.

        The last known token is always computed, because its logits are needed; so is the one before the first prompt position that is
        still to be scored.
        """
        num_tokens = len(self.tokens) - 1
        sampling = self.request.sampling
        if sampling.num_prompt_logprobs is not None:
            first_scored = max(sampling.prompt_logprobs_start, self.num_prompt_scored, 1)
            if first_scored < self.num_prompt:
                num_tokens = min(num_tokens, first_scored - 1)
        return num_tokens // block_size

    def row_sampling(self) -> SamplingSettings:
        """The settings of a new row: prompt positions that an earlier row has scored are not scored again."""
        sampling = self.request.sampling
        if sampling.num_prompt_logprobs is None or self.num_prompt_scored <= sampling.prompt_logprobs_start:
            return sampling
        if self.num_prompt_scored >= self.num_prompt:
            return sampling._replace(num_prompt_logprobs=None)
        return sampling._replace(prompt_logprobs_start=self.num_prompt_scored)
