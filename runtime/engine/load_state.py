"""The nouns of a load from the store: a request's wait, and a read that may outlive it, piece by piece."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cache_store.keys import BlockKey
from runtime.engine.live import LiveRequest

if TYPE_CHECKING:
    from cache_store.client import Acquired


class LoadPhase(enum.Enum):
    QUEUED = "queued"
    LOOKING = "looking"
    FOUND = "found"
    LOADING = "loading"
    AWAITING = "awaiting"


@dataclass(slots=True, eq=False)
class Wait:
    request: LiveRequest
    begun_s: float = math.inf  # of the current stretch of waiting; inf while it waits for its turn, rows or pages instead of the store
    deadline_s: float = math.inf
    phase: LoadPhase = LoadPhase.QUEUED
    num_found: int = 0  # leading blocks that pages and store hold together
    pinned: tuple[int, Acquired] | None = None  # what the lookup has acquired, from that depth on; until it is read or given back
    is_behind: bool = False  # another replica is computing the first of them
    flight_ends_s: float = math.inf  # when it waits no longer for that replica; inf until it has to
    look_at_s: float = math.inf  # of AWAITING
    look_after_s: float = 0.0  # the time between the last two looks


@dataclass(slots=True, eq=False)
class Job:
    """Columns of one entry per block, but `good` and `tiers` only of those whose slots are known."""

    wait: Wait | None  # None: the request went on without it, or ahead of it
    first: int  # depth of the first block
    keys: list[BlockKey]
    parents: list[BlockKey]
    pages: list[int]  # pinned, until `num_handed`
    good: list[bool] = field(default_factory=list)  # the page holds the block
    tiers: list[str] = field(default_factory=list)  # it came from; "" where a page had it already
    num_published: int = 0  # leading blocks that everybody finds in pages
    num_handed: int = 0  # leading blocks whose page the request holds instead of the job
    num_open: int = 0  # pieces with copies without an answer
    num_asked: int = 0  # leading blocks whose slots were asked for
    ahead: LiveRequest | None = None  # the request that went on ahead, with the pages of blocks that are still being copied
    is_acquiring: bool = False  # the answer is still to come
    is_cut: bool = False  # nothing behind `good` is read any more
    is_failed: bool = False  # the store has more of it, but could not bring it in time, had no room for it, or a copy did not deliver


@dataclass(slots=True, eq=False)
class Piece:
    """Blocks of a job that were acquired together."""

    job: Job
    lease_id: int
    num_open: int = 0  # copies without an answer
