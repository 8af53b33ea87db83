"""A block with a slot in the arena, from reservation to eviction.

    WRITING --all parts recorded, parent stored--> STORED --evicted--> GONE
       |  \\--its parent was given up--> ORPHANED --its lease ends--> GONE
       |--its lease ends--> GONE
       \\--its session ends while a writer lives--> QUARANTINED --every writer is gone--> GONE        (ORPHANED the same)

STORED is `used`; WRITING, ORPHANED and QUARANTINED are `held`: somebody may write to the slot. Only WRITING and STORED blocks are in the
index, so that a key is free to be reserved anew when its writer has failed.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache_store.leases import WriteLease
    from cache_store.slots import Slot


class BlockState(enum.Enum):
    WRITING = "writing"
    STORED = "stored"
    ORPHANED = "orphaned"
    QUARANTINED = "quarantined"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Block:
    """Kept by the DRAM tier; leases refer to it."""

    key: bytes
    layout: bytes  # digest of its layout
    num_bytes: int
    parent: Block | None  # None: the first of its sequence
    depth: int
    missing: int  # bit i: part i has no checksum yet
    checksums: array[int]  # xxh3-64 per part
    slot: Slot | None = None
    state: BlockState = BlockState.WRITING
    lease: WriteLease | None = None  # while held
    num_pins: int = 0
    accessed_s: float = 0.0  # when it was last used
    children: dict[Block, None] = field(default_factory=dict)  # a set with an order

    @property
    def is_exposed(self) -> bool:
        """May be evicted."""
        return self.state is BlockState.STORED and not self.num_pins and not self.children

    @property
    def is_held(self) -> bool:
        return self.state in (BlockState.WRITING, BlockState.ORPHANED, BlockState.QUARANTINED)

    @property
    def is_complete(self) -> bool:
        """Every part is recorded and the parent, if any, is visible."""
        return not self.missing and (self.parent is None or self.parent.state is BlockState.STORED)


def new_block(key: bytes, layout: bytes, num_bytes: int, num_parts: int, parent: Block | None) -> Block:
    depth = parent.depth + 1 if parent else 0
    return Block(key, layout, num_bytes, parent, depth, (1 << num_parts) - 1, array("Q", bytes(8 * num_parts)))
