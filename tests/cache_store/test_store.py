"""The store's rules, one at a time, without processes or time."""

import dataclasses

import pytest

from cache_store.blocks import BlockState
from cache_store.errors import ArenaTooSmall, LayoutMismatch, StoreRefused, StoreUnavailable
from tests.cache_store.conftest import LAYOUT, ROOT, Kit, chain, key, parents_of

OTHER_LAYOUT = dataclasses.replace(LAYOUT, block_size=8, part_shape=(1, 2, 8, 32))  # the same size, another meaning
BIG_LAYOUT = dataclasses.replace(LAYOUT, num_parts=6)  # three granules


def test_a_block_is_visible_once_all_its_parts_are_recorded(kit: Kit) -> None:
    session, _ = kit.attach()
    (a,) = chain("a", 1)
    placed = kit.store.reserve(session, [a], [ROOT], 60.0)
    assert placed.outcomes == ["reserved"]
    assert kit.store.commit(session, placed.lease_id, [(a, [1], [22])]) == ["partial"]
    assert kit.store.lookup(session, [a]) == 0
    assert kit.store.stat().held_slots == 1
    assert kit.store.commit(session, placed.lease_id, [(a, [0], [11])]) == ["committed"]
    assert kit.store.lookup(session, [a]) == 1
    [block] = kit.store.acquire(session, [a], 60.0).blocks
    assert list(block.checksums) == [11, 22]
    stat = kit.store.stat()
    assert (stat.blocks, stat.used_slots, stat.held_slots, stat.leases, stat.pinned_blocks) == (1, 1, 0, 1, 1)  # the write lease is over


def test_commit_after_the_lease_is_stale(kit: Kit) -> None:
    session, _ = kit.attach()
    placed = kit.store.reserve(session, [key("a")], [ROOT], 60.0)
    assert kit.store.release(session, [placed.lease_id]) == 1
    assert kit.store.release(session, [placed.lease_id]) == 0
    assert kit.store.commit(session, placed.lease_id, [(key("a"), [0, 1], [1, 2])]) == ["stale"]
    assert kit.store.stat().held_slots == 0


def test_a_part_that_does_not_exist_is_refused_and_changes_nothing(kit: Kit) -> None:
    session, _ = kit.attach()
    placed = kit.store.reserve(session, [key("a")], [ROOT], 60.0)
    with pytest.raises(ValueError, match="parts"):
        kit.store.commit(session, placed.lease_id, [(key("a"), [0, 2], [1, 2])])
    assert kit.store.commit(session, placed.lease_id, [(key("a"), [1], [2])]) == ["partial"]


def test_a_child_waits_for_its_parent(kit: Kit) -> None:
    session, _ = kit.attach()
    keys = chain("a", 3)
    placed = kit.store.reserve(session, keys, parents_of(keys), 60.0)
    assert kit.store.commit(session, placed.lease_id, [(k, [0, 1], [1, 2]) for k in keys[1:]]) == ["partial", "partial"]
    assert kit.store.stat().blocks == 0
    assert kit.store.commit(session, placed.lease_id, [(keys[0], [0, 1], [1, 2])]) == ["committed"]
    assert kit.store.lookup(session, keys) == 3


def test_children_of_a_parent_that_was_given_up_never_become_visible(kit: Kit) -> None:
    session, _ = kit.attach()
    a, b, c = chain("a", 3)
    first = kit.store.reserve(session, [a], [ROOT], 60.0)
    second = kit.store.reserve(session, [b, c], [a, b], 60.0)
    assert second.outcomes == ["reserved", "reserved"]
    kit.store.commit(session, second.lease_id, [(b, [0, 1], [1, 2])])
    kit.store.release(session, [first.lease_id])
    assert kit.store.commit(session, second.lease_id, [(b, [0, 1], [1, 2]), (c, [0, 1], [1, 2])]) == ["stale", "stale"]
    assert kit.store.stat().held_slots == 2  # somebody may still write to them
    assert kit.store.check() == []
    kit.store.release(session, [second.lease_id])
    assert kit.store.stat().held_slots == 0
    assert kit.put(session, [a, b, c]) == ["reserved"] * 3


def test_reserve_wants_parents_first(kit: Kit) -> None:
    one, _ = kit.attach()
    two, _ = kit.attach()
    a, b, c = chain("a", 3)
    assert kit.store.reserve(one, [b], [a], 60.0, [False]).outcomes == ["no_parent"]
    held = kit.store.reserve(one, [a], [ROOT], 60.0, [True])
    assert kit.store.reserve(two, [a, b], [ROOT, a], 60.0, [True, False]).outcomes == ["written_elsewhere", "no_parent"]
    assert kit.store.reserve(one, [b], [a], 60.0, [False]).outcomes == ["reserved"]
    kit.store.commit(one, held.lease_id, [(a, [0, 1], [1, 2])])
    assert kit.store.reserve(two, [a, c], [ROOT, a], 60.0, [True, False]).outcomes == ["stored", "reserved"]


def test_without_first_an_unknown_parent_is_a_root_but_not_a_refused_one(kit: Kit) -> None:
    one, _ = kit.attach()
    two, _ = kit.attach()
    kit.make(num_slots=4)
    one, _ = kit.attach()
    keys = chain("a", 6)
    assert kit.store.reserve(one, keys, parents_of(keys), 60.0).outcomes == ["reserved"] * 4 + ["no_space", "no_parent"]
    two, _ = kit.attach()
    assert kit.store.reserve(two, [keys[1], key("x")], [keys[0], keys[0]], 60.0).outcomes == ["written_elsewhere", "no_parent"]


def test_eviction_takes_the_coldest_leaf_and_never_a_parent(kit: Kit) -> None:
    session, _ = kit.attach()
    a, b = chain("a", 5), chain("b", 3)
    kit.put(session, a)
    kit.put(session, b)
    kit.store.acquire(session, a, 1.0)
    kit.advance(2.0)
    assert kit.put(session, [key("x")], [ROOT]) == ["reserved"]
    assert (kit.store.lookup(session, a), kit.store.lookup(session, b)) == (5, 2)  # b's leaf, though its parents are as cold
    for name in "yz":
        kit.put(session, [key(name)], [ROOT])
    assert (kit.store.lookup(session, a), kit.store.lookup(session, b)) == (5, 0)
    assert kit.store.stat().evicted_blocks == 3


def test_pins_and_held_children_keep_blocks_from_eviction(kit: Kit) -> None:
    session, _ = kit.attach()
    a = chain("a", 3)
    kit.put(session, a)
    lease, blocks = kit.store.acquire(session, a[:2], 60.0)
    assert len(blocks) == 2
    held = kit.store.reserve(session, [key("child")], [a[2]], 60.0)
    fill = [key(f"fill{i}") for i in range(10)]
    placed = kit.store.reserve(session, fill, [ROOT] * 10, 60.0)
    assert placed.outcomes == ["reserved"] * 4 + ["no_space"] * 6
    assert kit.store.lookup(session, a) == 3
    kit.store.release(session, [lease, held.lease_id])
    assert kit.store.reserve(session, [key("m"), key("n")], [ROOT, ROOT], 60.0).outcomes == ["reserved", "reserved"]
    assert kit.store.lookup(session, a) == 2  # one took the child's slot, one a[2]'s


def test_an_expired_pin_simply_ends(kit: Kit) -> None:
    session, _ = kit.attach()
    keys = chain("a", 3)
    kit.put(session, keys)
    lease, _ = kit.store.acquire(session, keys, 5.0)
    assert kit.store.next_s() == pytest.approx(105.0)
    kit.advance(4.9)
    assert kit.store.stat().pinned_blocks == 3
    kit.advance(0.2)
    assert kit.store.stat().pinned_blocks == 0
    assert kit.watcher.killed == []
    assert kit.store.release(session, [lease]) == 0
    assert kit.store.next_s() is None


def test_a_generation_changes_before_a_slot_is_handed_out_again(kit: Kit) -> None:
    session, _ = kit.attach()
    words = kit.store.tier.arena.words
    seen: set[tuple[int, int]] = set()
    for number in range(40):
        placed = kit.store.reserve(session, [key(number)], [ROOT], 60.0)
        [block] = placed.blocks
        assert block
        assert block.slot
        assert words[block.slot.offset >> 12] == block.slot.generation != 0
        assert (block.slot.offset, block.slot.generation) not in seen
        seen.add((block.slot.offset, block.slot.generation))
        if number % 3:
            kit.store.commit(session, placed.lease_id, [(key(number), [0, 1], [1, 2])])
        else:
            kit.store.release(session, [placed.lease_id])
            assert words[block.slot.offset >> 12] != block.slot.generation


def test_an_overdue_writer_is_killed_and_its_slots_are_quarantined_until_it_is_gone(kit: Kit) -> None:
    session, pids = kit.attach(num_processes=2)
    other, _ = kit.attach()
    keys = chain("a", 3)
    placed = kit.store.reserve(session, keys, parents_of(keys), 5.0)
    kit.store.acquire(session, keys, 60.0)
    kit.advance(5.5)
    assert kit.watcher.killed == []  # the grace
    kit.advance(1.0)
    assert sorted(kit.watcher.killed) == pids
    stat = kit.store.stat()
    assert (stat.quarantined_slots, stat.held_slots, stat.killed_holders, stat.sessions, stat.leases) == (3, 3, 2, 1, 0)
    with pytest.raises(StoreUnavailable):
        kit.store.commit(session, placed.lease_id, [(keys[0], [0, 1], [1, 2])])
    assert kit.store.check() == []
    assert kit.put(other, keys) == ["reserved"] * 3  # in other slots
    kit.watcher.die(pids[0])
    assert kit.store.stat().quarantined_slots == 3
    kit.watcher.die(pids[1])
    assert kit.store.stat().held_slots == 0
    assert kit.watcher.num_open == 1


def test_a_session_ends_when_its_last_process_does(kit: Kit) -> None:
    session, pids = kit.attach(num_processes=2)
    kit.put(session, chain("a", 2))
    kit.store.acquire(session, chain("a", 2), 60.0)
    kit.store.reserve(session, [key("b")], [ROOT], 60.0)
    kit.store.claim(session, [key("c")], 60.0)
    kit.watcher.die(pids[0])
    assert kit.store.stat().sessions == 1
    kit.watcher.die(pids[1])
    stat = kit.store.stat()
    assert (stat.sessions, stat.leases, stat.held_slots, stat.pinned_blocks, stat.claims, stat.blocks) == (0, 0, 0, 0, 0, 2)
    assert kit.store.next_s() is None


def test_detach_keeps_unfinished_slots_until_the_processes_are_gone_and_kills_nobody(kit: Kit) -> None:
    session, pids = kit.attach()
    kit.store.reserve(session, [key("a")], [ROOT], 5.0)
    kit.store.detach(session)
    with pytest.raises(StoreUnavailable):
        kit.store.detach(session)
    kit.advance(100.0)
    assert kit.store.stat().quarantined_slots == 1
    assert kit.watcher.killed == []
    kit.watcher.die(pids[0])
    assert kit.store.stat().held_slots == 0


def test_a_second_attach_of_the_same_processes_replaces_the_first(kit: Kit) -> None:
    first = kit.store.attach(LAYOUT, [(5000, 1)], "engine").session_id
    same = kit.store.attach(LAYOUT, [(5000, 1)], "another label").session_id
    kit.store.reserve(first, [key("a")], [ROOT], 5.0)
    second = kit.store.attach(LAYOUT, [(5000, 1)], "engine").session_id
    with pytest.raises(StoreUnavailable):
        kit.store.lookup(first, [])
    kit.advance(100.0)
    assert kit.watcher.killed == []
    assert kit.store.lookup(same, []) == kit.store.lookup(second, []) == 0
    kit.watcher.die(5000)
    assert (kit.store.stat().held_slots, kit.store.stat().sessions) == (0, 0)


def test_a_later_session_of_the_same_processes_may_release_what_was_quarantined(kit: Kit) -> None:
    first = kit.store.attach(LAYOUT, [(5000, 1)], "engine").session_id
    one = kit.store.reserve(first, [key("a"), key("b")], [ROOT, ROOT], 60.0).lease_id
    two = kit.store.reserve(first, [key("c")], [ROOT], 60.0).lease_id
    kit.store.detach(first)
    stranger, _ = kit.attach()
    again = kit.store.attach(LAYOUT, [(5000, 1)], "engine").session_id
    assert kit.store.release(stranger, [one, two]) == 0
    assert kit.store.release(again, [one, one]) == 1
    assert kit.store.check() == []
    assert kit.store.stat().quarantined_slots == 1
    assert kit.store.release(again, [two]) == 1
    assert (kit.store.stat().held_slots, kit.watcher.num_open) == (0, 2)


def test_claims_tell_others_to_wait(kit: Kit) -> None:
    one, pids = kit.attach()
    two, _ = kit.attach()
    a, b, c, d = (key(name) for name in "abcd")
    kit.put(one, [a])
    kit.store.reserve(one, [b], [ROOT], 60.0)
    assert kit.store.claim(one, [a, b, c], 5.0) == ["stored", "granted", "granted"]
    assert kit.store.claim(two, [a, b, c, d], 50.0) == ["stored", "elsewhere", "elsewhere", "granted"]
    assert kit.store.stat().claims == 3
    kit.advance(6.0)
    assert kit.store.claim(two, [b, c], 50.0) == ["elsewhere", "granted"]  # b is being written
    assert kit.put(one, [c]) == ["reserved"]  # a claim holds nobody up who has the bytes
    assert kit.store.stat().claims == 1
    kit.watcher.die(pids[0])
    assert kit.store.claim(two, [b], 50.0) == ["granted"]


def test_a_renewed_claim_lives_longer(kit: Kit) -> None:
    one, _ = kit.attach()
    kit.store.claim(one, [key("a")], 5.0)
    kit.store.claim(one, [key("a")], 50.0)
    kit.advance(6.0)
    assert kit.store.stat().claims == 1
    kit.advance(50.0)
    assert kit.store.stat().claims == 0


def test_blocks_of_another_layout_are_misses(kit: Kit) -> None:
    one, _ = kit.attach()
    two, _ = kit.attach(OTHER_LAYOUT)
    keys = chain("a", 2)
    kit.put(one, keys)
    assert kit.store.lookup(two, keys) == 0
    assert kit.store.acquire(two, keys, 1.0).lease_id == 0
    assert kit.store.reserve(two, [key("b")], [keys[1]], 1.0).outcomes == ["no_parent"]


def test_an_empty_extent_serves_another_slot_size(kit: Kit) -> None:
    small, _ = kit.attach()
    placed = kit.store.reserve(small, chain("a", 8), parents_of(chain("a", 8)), 60.0)
    big, _ = kit.attach(BIG_LAYOUT)
    assert kit.store.reserve(big, [key("big")], [ROOT], 60.0).outcomes == ["no_space"]
    kit.store.release(small, [placed.lease_id])
    assert kit.store.reserve(big, [key("big")], [ROOT], 60.0).outcomes == ["reserved"]
    assert kit.store.check() == []


def test_an_idle_extent_is_emptied_for_another_slot_size(kit: Kit) -> None:
    small, _ = kit.attach()
    a, b = chain("a", 4), chain("b", 4)
    kit.put(small, a)
    kit.advance(1.0)
    kit.put(small, [b[0]], [a[3]])  # b hangs on a: it goes with it
    kit.advance(1.0)
    kit.put(small, b[1:], [ROOT, *b[1:3]])
    big, _ = kit.attach(BIG_LAYOUT)
    kit.advance(1.0)
    lease, _ = kit.store.acquire(small, a[:1], 60.0)
    kit.store.acquire(small, b[1:], 60.0)
    assert kit.store.reserve(big, [key("big")], [ROOT], 60.0).outcomes == ["no_space"]
    kit.store.release(small, [lease])
    assert kit.store.reserve(big, [key("big")], [ROOT], 60.0).outcomes == ["reserved"]
    assert (kit.store.lookup(small, a), kit.store.lookup(small, b[1:])) == (0, 3)
    assert kit.store.lookup(small, [b[0]]) == 0


@pytest.mark.parametrize(
    ("layout", "error"),
    [
        (dataclasses.replace(LAYOUT, num_parts=9), ArenaTooSmall),
        (dataclasses.replace(LAYOUT, num_parts=0), LayoutMismatch),
        (dataclasses.replace(LAYOUT, part_shape=()), LayoutMismatch),
        (dataclasses.replace(LAYOUT, dtype="int3"), LayoutMismatch),
    ],
)
def test_attach_refuses_layouts_that_cannot_be(kit: Kit, layout: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        kit.attach(layout)  # type: ignore[arg-type]
    assert kit.store.stat().sessions == 0


def test_attach_refuses_processes_that_cannot_be_watched(kit: Kit) -> None:
    kit.watcher.die(77)
    with pytest.raises(StoreRefused):
        kit.store.attach(LAYOUT, [(76, 1), (77, 1)], "half dead")
    with pytest.raises(StoreRefused):
        kit.store.attach(LAYOUT, [], "nobody")
    assert kit.watcher.num_open == 0


def test_tables_are_bounded(kit: Kit) -> None:
    kit.make(max_sessions=2, max_leases=3, max_claims=2)
    session, _ = kit.attach()
    kit.attach()
    with pytest.raises(StoreRefused):
        kit.attach()
    kit.put(session, [key("a")], [ROOT])
    assert [kit.store.acquire(session, [key("a")], 9.0).lease_id > 0 for _ in range(4)] == [True, True, True, False]
    assert kit.store.reserve(session, [key("b")], [ROOT], 9.0).outcomes == ["no_space"]
    assert kit.store.claim(session, [key("x"), key("y"), key("z")], 9.0) == ["granted"] * 3
    assert kit.store.stat().claims == 2


def test_events_follow_what_is_visible(kit: Kit) -> None:
    session, _ = kit.attach()
    visible: set[bytes] = set()
    for number in range(30):
        kit.put(session, chain(number, 1 + number % 3))
    for sequence, event in enumerate(kit.events, start=1):
        assert event.sequence == sequence
        assert not visible & set(event.added)
        assert visible >= set(event.removed)
        visible = (visible | set(event.added)) - set(event.removed)
    stored = {each for each, block in kit.store.tier.index.items() if block.state is BlockState.STORED}
    assert visible == stored == set(kit.store.snapshot().added)
    assert kit.store.snapshot().sequence == len(kit.events)


def test_hits_and_misses_are_counted(kit: Kit) -> None:
    session, _ = kit.attach()
    keys = chain("a", 3)
    kit.put(session, keys[:2])
    kit.store.acquire(session, keys, 1.0)
    stat = kit.store.stat()
    assert (stat.hit_blocks, stat.missed_blocks, stat.committed_blocks) == (2, 1, 2)
    assert stat.used_bytes == 2 * LAYOUT.block_bytes
    assert stat.total_bytes == stat.ready_bytes == 8 * LAYOUT.block_bytes


def test_check_sees_what_is_broken(kit: Kit) -> None:
    session, _ = kit.attach()
    keys = chain("a", 2)
    kit.put(session, keys)
    block = kit.store.tier.index[keys[1]]
    block.num_pins = 1
    assert any("pins" in problem for problem in kit.store.check())
    block.num_pins = 0
    block.state = BlockState.ORPHANED
    assert any("held" in problem for problem in kit.store.check())
    block.state = BlockState.STORED
    slot = block.slot
    assert slot
    slot.extent.free.append(slot.number)
    assert any("owned and free" in problem for problem in kit.store.check())
    slot.extent.free.pop()
    assert kit.store.check() == []
