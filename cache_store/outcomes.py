"""What the store answers with, in words. Positions correspond to the keys of the question."""

from __future__ import annotations

import enum
from typing import NamedTuple

from cache_store.blocks import Block, BlockState
from cache_store.keys import BlockKey


class ClaimOutcome(enum.StrEnum):
    GRANTED = "granted"
    STORED = "stored"  # already there
    ELSEWHERE = "elsewhere"  # another session is computing or writing it


class ReserveOutcome(enum.StrEnum):
    RESERVED = "reserved"
    STORED = "stored"  # already there: nothing to write
    WRITTEN_ELSEWHERE = "written_elsewhere"  # another lease holds the slot
    NO_SPACE = "no_space"
    NO_PARENT = "no_parent"


class CommitOutcome(enum.StrEnum):
    COMMITTED = "committed"  # complete and visible
    PARTIAL = "partial"  # more parts are to come, of this block or of a parent that is being written
    STALE = "stale"  # not held by this lease any more


def commit_outcome(block: Block | None) -> CommitOutcome:
    """What a block is after a commit; None: it was not held."""
    if block is None or block.state is BlockState.ORPHANED:
        return CommitOutcome.STALE
    return CommitOutcome.COMMITTED if block.state is BlockState.STORED else CommitOutcome.PARTIAL


class Pinned(NamedTuple):
    """Leading blocks found; lease 0 when there is none."""

    lease_id: int
    blocks: list[Block]


class Placed(NamedTuple):
    """Per key: RESERVED comes with a block; lease 0 when nothing was reserved."""

    lease_id: int
    outcomes: list[ReserveOutcome]
    blocks: list[Block | None]


class WatchEvent(NamedTuple):
    """A gap in `sequence` means that events were dropped: watch again for a new snapshot. Events of the snapshot share one number."""

    sequence: int
    epoch: str
    tier: str
    added: list[BlockKey]
    removed: list[BlockKey]


class StoreStat(NamedTuple):
    """As StatResponse in protos/cache_store.proto."""

    epoch: str
    blocks: int
    total_bytes: int
    ready_bytes: int
    used_bytes: int
    used_slots: int
    free_slots: int
    held_slots: int
    quarantined_slots: int
    pinned_blocks: int
    leases: int
    sessions: int
    claims: int
    hit_blocks: int
    missed_blocks: int
    committed_blocks: int
    evicted_blocks: int
    killed_holders: int
    kept_bytes: int
    disk_blocks: int = 0
    disk_bytes: int = 0
    disk_total_bytes: int = 0
    num_peers: int = 0
    leased_blocks: int = 0
    num_pins: int = 0
