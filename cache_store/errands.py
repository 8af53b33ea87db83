"""Blocks that the store itself reads and writes: copies on their way to disk, to a peer, or back.

They are held and pinned like anybody's, by leases of one session that never ends: the store's own. Its threads are waited for, never
killed.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache_store.blocks import Block, BlockState, new_block
from cache_store.keys import Layout
from cache_store.leases import ReadLease, Session, WriteLease
from cache_store.tiers.dram import DramTier


@dataclass(frozen=True, slots=True)
class Shape:
    """What the store knows of a block that it does not have yet."""

    layout: bytes  # digest
    num_bytes: int
    num_parts: int


class Errands:
    """Owner of the store's own session. Runs on the store's thread."""

    def __init__(self, tier: DramTier, lease_ids: itertools.count[int], admit: Callable[[Block], None]) -> None:
        """`admit` makes a complete block visible, and those behind it."""
        layout = Layout("", 0, 1, "float32", 1, (1,))
        self.session = Session("", "the store", layout, b"", ())
        self._tier, self._lease_ids, self._admit = tier, lease_ids, admit

    def lend(self, blocks: Sequence[Block]) -> ReadLease:
        """Pins visible blocks until `end_loan`."""
        self._tier.pin(blocks)
        loan = ReadLease(next(self._lease_ids), self.session, list(blocks))
        if loan.blocks:
            self.session.reads[loan.lease_id] = loan
        return loan

    def end_loan(self, loan: ReadLease) -> None:
        if not loan.is_over:
            loan.is_over = True
            self.session.reads.pop(loan.lease_id, None)
            self._tier.unpin(loan.blocks)

    def begin_fill(self, key: bytes, shape: Shape, parent: Block | None) -> Block | None:
        """A slot for a block that is about to come; None when there is no room, or somebody has it already."""
        if key in self._tier.index or not self._tier.can_hold(shape.num_bytes):
            return None
        if parent is not None and (parent.layout != shape.layout or parent.state not in (BlockState.STORED, BlockState.WRITING)):
            return None
        block = new_block(key, shape.layout, shape.num_bytes, shape.num_parts, parent)
        if not self._tier.place(block):
            return None
        lease = WriteLease(next(self._lease_ids), self.session, {key: block})
        block.lease = lease
        self.session.writes[lease.lease_id] = lease
        return block

    def end_fill(self, block: Block, checksums: bytes | None) -> None:
        """Nobody writes to the slot any more. None: what is in it is not the block."""
        if block.state is BlockState.WRITING and checksums is not None:
            block.checksums, block.missing = array("Q", checksums), 0
            if block.is_complete:
                self._admit(block)
            return
        block.missing = 0  # it was written to the end, for what its state is concerned with
        if block.state is BlockState.WRITING:
            self._give_up(block)
        elif block.state is BlockState.ORPHANED:
            self._free(block)

    def _give_up(self, block: Block) -> None:
        """What hangs on a block that did not come is of no use; those that are still being written are freed at their own end."""
        below = [block]
        for each in below:
            below += each.children
        self._tier.abandon(block, BlockState.ORPHANED)
        for each in below:
            if not each.missing:
                self._free(each)

    def _free(self, block: Block) -> None:
        lease = block.lease
        assert lease
        del lease.blocks[block.key]
        lease.is_over = True
        lease.session.writes.pop(lease.lease_id, None)
        self._tier.free(block)
