"""What must hold between leases and blocks after every call to the store, whatever happened before."""

from __future__ import annotations

from collections.abc import Sequence

from cache_store.blocks import BlockState
from cache_store.leases import ReadLease, Session, WriteLease
from cache_store.tiers.dram import DramTier


def check_leases(tier: DramTier, clients: Sequence[Session], ending: Sequence[Session], own: Session) -> list[str]:
    """Every violated invariant, in words. `ending` are the sessions that have only quarantined blocks left; `own` is the store's, which has
    no processes and does not end."""
    problems = []
    opened = [*clients, own]
    leased = [(lease, block) for session in opened for lease in session.writes.values() for block in lease.blocks.values()]
    quarantined = [block for session in ending for block in session.quarantined]
    if len(leased) + len(quarantined) != tier.num_held:
        problems.append(f"{len(leased)} leased and {len(quarantined)} quarantined blocks are not the {tier.num_held} held ones")
    for lease, block in leased:
        if block.lease is not lease or block.state not in (BlockState.WRITING, BlockState.ORPHANED):
            problems.append(f"the {block.state.value} block {block.key.hex()} is in lease {lease.lease_id}")
        if block.state is BlockState.WRITING and block.is_complete:
            problems.append(f"block {block.key.hex()} is complete and not visible")
    strays = (block for block in quarantined if block.state is not BlockState.QUARANTINED)
    problems += [f"the {block.state.value} block {block.key.hex()} is in quarantine" for block in strays]
    num_pins = sum(len(lease.blocks) for session in opened for lease in session.reads.values())
    if num_pins != sum(block.num_pins for block in tier.index.values()):
        problems.append(f"the blocks do not count the {num_pins} pins of the leases")
    for session in opened:
        name = f"session {session.session_id}"
        if (not session.alive and session is not own) or session.quarantined:
            problems.append(f"{name} is open with {len(session.alive)} processes and {len(session.quarantined)} quarantined blocks")
        leases: list[ReadLease | WriteLease] = [*session.reads.values(), *session.writes.values()]
        over = [each.lease_id for each in leases if each.is_over or not each.blocks or each.session is not session]
        if over:
            problems.append(f"{name} has leases {over}, which are over")
    gone = (session for session in ending if not session.alive or not session.quarantined or session.reads or session.writes)
    problems += [f"session {session.session_id} should be gone" for session in gone]
    return problems
