"""The nouns of a load from the store: a request's wait, and a read that may outlive it. `kv_loads` writes both."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from cache_store.keys import BlockKey
from runtime.engine.live import LiveRequest


class LoadPhase(enum.Enum):
    QUEUED = "queued"
    LOOKING = "looking"
    CLAIMING = "claiming"
    FOUND = "found"
    ACQUIRING = "acquiring"
    LOADING = "loading"
    AWAITING = "awaiting"


@dataclass(slots=True, eq=False)
class Wait:
    request: LiveRequest
    begun_s: float = math.inf  # of the current stretch of waiting; inf while it waits for its turn, rows or pages instead of the store
    deadline_s: float = math.inf
    phase: LoadPhase = LoadPhase.QUEUED
    num_found: int = 0  # leading blocks that pages and store hold together
    is_behind: bool = False  # another replica is computing the block after those
    flight_ends_s: float = math.inf  # when it waits no longer for that replica; inf until it has to
    look_at_s: float = math.inf  # of AWAITING
    look_after_s: float = 0.0  # the time between the last two looks


@dataclass(slots=True, eq=False)
class Job:
    wait: Wait | None  # None: the request went on without it
    first: int  # depth of the first block
    keys: list[BlockKey]
    parents: list[BlockKey]
    lease_id: int = 0
    pages: list[int | None] = field(default_factory=list)  # None: in some page already
    tiers: list[str] = field(default_factory=list)
    good: list[bool] = field(default_factory=list)
    num_open: int = 0  # copies without an answer
    is_late: bool = False  # the store has more of it, but could not bring it in time, or had no room for it
