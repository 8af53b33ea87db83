"""What this store has lent to its peers: blocks pinned for one transfer, known by a ticket that is good once.

    lent --ticket shown--> being sent --acknowledged, broken off, or its time is up--> over
      |--its time is up--> over

A transfer that outlives its loan is noticed by the slots' generation words, and by the receiver's checksums.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cache_store.arena import Arena
from cache_store.blocks import Block
from cache_store.errands import Errands
from cache_store.leases import ReadLease

TICKET_BYTES = 16
MAX_LOANS = 1024


class Lent(NamedTuple):
    """One block of a loan."""

    offset: int
    num_bytes: int
    generation: int


class Span(NamedTuple):
    """Blocks that lie one after the other in the arena."""

    offset: int
    num_bytes: int
    blocks: list[Lent]


def spans(blocks: Sequence[Lent], max_bytes: int) -> Iterator[Span]:
    """The blocks, in their order, as spans of up to `max_bytes`, or of one block that is larger."""
    run: list[Lent] = []
    for block in blocks:
        end = run[-1].offset + run[-1].num_bytes if run else -1
        if run and (block.offset != end or end + block.num_bytes - run[0].offset > max_bytes):
            yield Span(run[0].offset, end - run[0].offset, run)
            run = []
        run.append(block)
    if run:
        yield Span(run[0].offset, run[-1].offset + run[-1].num_bytes - run[0].offset, run)


@dataclass(slots=True, eq=False)
class Loan:
    ticket: bytes
    blocks: list[Lent]
    deadline_s: float  # on the loop's clock, which is time.monotonic
    lease: ReadLease


class Tickets:
    """`lend` and what it calls run on the store's loop; `redeem`, `is_whole` and `end` may be called from any thread."""

    def __init__(self, arena: Arena, errands: Errands, loop: asyncio.AbstractEventLoop) -> None:
        self.sent_bytes = 0
        self._arena, self._errands, self._loop = arena, errands, loop
        self._loans: dict[bytes, Loan] = {}  # not yet redeemed
        self._open: set[Loan] = set()

    def lend(self, blocks: Sequence[Block], timeout_s: float) -> Loan | None:
        """None when there are too many loans already."""
        if len(self._open) >= MAX_LOANS:
            return None
        slots = [Lent(block.slot.offset, block.num_bytes, block.slot.generation) for block in blocks if block.slot]
        loan = Loan(secrets.token_bytes(TICKET_BYTES), slots, self._loop.time() + timeout_s, self._errands.lend(blocks))
        self._loans[loan.ticket] = loan
        self._open.add(loan)
        self._loop.call_later(timeout_s, self._end, loan)
        return loan

    def redeem(self, ticket: bytes) -> Loan | None:
        """The loan of a ticket that was not shown before."""
        return self._loans.pop(ticket, None)

    def is_whole(self, block: Lent) -> bool:
        """Whether the slot still holds what was lent."""
        return self._arena.words[block.offset >> 12] == block.generation

    def end(self, loan: Loan, num_bytes: int) -> None:
        """The transfer is over, after so many bytes."""
        self._loop.call_soon_threadsafe(self._end, loan, num_bytes)

    def close(self) -> None:
        for loan in list(self._open):
            self._end(loan)

    def _end(self, loan: Loan, num_bytes: int = 0) -> None:
        self.sent_bytes += num_bytes
        self._open.discard(loan)
        self._loans.pop(loan.ticket, None)
        self._errands.end_loan(loan.lease)
