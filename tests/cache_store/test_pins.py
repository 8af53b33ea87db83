"""Prefixes that an owner has asked to be kept: last to go, first to expire, and never more than a share."""

from __future__ import annotations

import pytest

from cache_store.leases import Pin
from tests.cache_store.conftest import LAYOUT, SLOT_BYTES, Kit, chain, key


@pytest.fixture
def kit_of_ten(kit: Kit) -> Kit:
    kit.make(num_slots=10, extent_slots=5, max_pinned_share=0.5, max_pinned_share_per_owner=0.3)
    return kit


def keep(kit: Kit, owner: str, keys: list, ttl_s: float = 60.0) -> Pin | None:
    return kit.store.pins.add(owner, kit.store.tier.leading(keys, LAYOUT.digest()), ttl_s)


def test_a_kept_prefix_outlives_what_is_used_more(kit_of_ten: Kit) -> None:
    kit = kit_of_ten
    session, pids = kit.attach()
    kept, others = chain("kept", 3), chain("others", 6)
    kit.put(session, kept)
    assert keep(kit, "tenant", kept)
    kit.put(session, others)
    kit.watcher.die(pids[0])  # the session's end is not the pin's
    session, _ = kit.attach()
    for number in range(20):
        kit.store.acquire(session, others, 1.0)
        kit.advance(2.0)
        kit.put(session, chain(number, 2))
    assert kit.store.lookup(session, kept) == 3
    assert kit.store.lookup(session, others) < 6
    kit.advance(61.0)
    assert kit.store.stat().kept_bytes == 0
    for number in range(20, 40):
        kit.put(session, chain(number, 2))
    assert kit.store.lookup(session, kept) == 0


def test_quotas_per_owner_and_in_all(kit_of_ten: Kit) -> None:
    kit = kit_of_ten
    session, _ = kit.attach()
    one, two, three = chain("one", 4), chain("two", 3), chain("three", 1)
    for keys in (one, two, three):
        kit.put(session, keys)
    first = keep(kit, "a", one)
    assert first
    assert (len(first.loan.blocks), first.num_bytes) == (3, 3 * SLOT_BYTES)  # of four: the leading ones that the quota allows
    assert keep(kit, "a", three) is None
    second = keep(kit, "b", two)
    assert second
    assert len(second.loan.blocks) == 2  # five in all
    assert keep(kit, "c", three) is None
    assert kit.store.stat().kept_bytes == 5 * SLOT_BYTES
    assert kit.store.pins.remove("b", [first.pin_id]) == 0  # another's
    assert kit.store.pins.remove("a", [first.pin_id, first.pin_id]) == 1
    assert keep(kit, "c", three)
    assert [pin.owner for pin in kit.store.pins.of("")] == ["b", "c"]
    assert [pin.owner for pin in kit.store.pins.of("b")] == ["b"]
    assert keep(kit, "d", chain("nobody's", 2)) is None


def test_when_nothing_else_is_left_the_pin_that_ends_first_goes(kit_of_ten: Kit) -> None:
    kit = kit_of_ten
    session, _ = kit.attach()
    soon, late = chain("soon", 2), chain("late", 3)
    kit.put(session, soon)
    kit.put(session, late)
    assert keep(kit, "a", soon, 30.0)
    assert keep(kit, "b", late, 90.0)
    held = [key(number) for number in range(7)]
    placed = kit.store.reserve(session, held, [key("root")] * 7, 60.0, [True] * 7)
    assert placed.outcomes == ["reserved"] * 7
    assert (kit.store.lookup(session, soon), kit.store.lookup(session, late)) == (0, 3)
    assert [pin.owner for pin in kit.store.pins.of("")] == ["b"]


def test_the_table_of_pins_is_bounded(kit: Kit) -> None:
    kit.make(num_slots=10, extent_slots=5, max_pins=2)
    session, _ = kit.attach()
    for name in "abc":
        kit.put(session, [key(name)])
    assert [keep(kit, "a", [key(name)]) is not None for name in "abc"] == [True, True, False]
    assert keep(kit, "a", [key("b")]), "a renewed pin takes no further place"


def test_asking_again_renews_a_pin_and_a_longer_prefix_takes_it_in(kit_of_ten: Kit) -> None:
    kit = kit_of_ten
    session, _ = kit.attach()
    keys = chain("prefix", 3)
    kit.put(session, keys)
    first = keep(kit, "a", keys[:2], 30.0)
    assert first
    again = keep(kit, "a", keys[:2], 60.0)
    assert again
    assert (again.pin_id, again.deadline_s - first.deadline_s) == (first.pin_id, 30.0)
    assert keep(kit, "a", keys[:2], 10.0)
    assert [(pin.pin_id, pin.deadline_s) for pin in kit.store.pins.of("a")] == [(first.pin_id, again.deadline_s)], "never shortened"
    other = keep(kit, "b", keys[:1])
    assert other
    longer = keep(kit, "a", keys, 90.0)
    assert longer
    assert [pin.pin_id for pin in kit.store.pins.of("")] == [other.pin_id, longer.pin_id]
    stat = kit.store.stat()
    assert (stat.kept_bytes, stat.num_pins, stat.pinned_blocks, stat.leased_blocks) == (4 * SLOT_BYTES, 2, 3, 0)
    lease_id = kit.store.acquire(session, keys[:2], 60.0).lease_id
    assert kit.store.stat().leased_blocks == 2
    kit.store.release(session, [lease_id])
    assert kit.store.stat().leased_blocks == 0
    brief = keep(kit, "c", keys[:1], 20.0)
    assert brief
    assert kit.store.check() == []
    kit.advance(25.0)
    assert [pin.owner for pin in kit.store.pins.of("")] == ["b", "a"]
    kit.advance(70.0)
    assert kit.store.stat().kept_bytes == kit.store.stat().pinned_blocks == 0
