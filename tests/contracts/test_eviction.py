"""What every eviction policy must keep to, whatever it prefers; and what LRU in particular prefers."""

from __future__ import annotations

import random

import pytest

from cache_store.eviction import EVICTION, EvictionPolicy, Lru


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


@pytest.fixture(params=sorted(EVICTION))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return EVICTION[request.param]()


def test_nothing_to_evict(policy: EvictionPolicy) -> None:
    assert policy.victim() is None
    policy.admitted(name(1))
    assert policy.victim() is None
    policy.exposed(name(1))
    assert policy.victim() == name(1)
    policy.shielded(name(1))
    policy.shielded(name(1))
    assert policy.victim() is None


def test_asking_for_a_victim_changes_nothing(policy: EvictionPolicy) -> None:
    for number in range(8):
        policy.admitted(name(number))
        policy.exposed(name(number))
    assert len({policy.victim() for _ in range(20)}) == 1


@pytest.mark.parametrize("seed", range(4))
def test_random_lives(policy: EvictionPolicy, seed: int) -> None:
    """A victim is always an exposed block, and there is one whenever a block is exposed. Draining in the end returns each once."""
    rng = random.Random(seed)
    present: set[int] = set()
    exposed: set[int] = set()
    for number in range(4000):
        action = rng.choice(["admit", "access", "expose", "expose", "shield", "remove", "evict"])
        some = rng.choice(sorted(present)) if present else None
        if action == "admit" or some is None:
            policy.admitted(name(number))
            present.add(number)
        elif action == "access":
            policy.accessed([name(each) for each in rng.sample(sorted(present), min(len(present), 5))])
        elif action == "expose":
            policy.exposed(name(some))
            exposed.add(some)
        elif action == "shield":
            policy.shielded(name(some))
            exposed.discard(some)
        elif action == "remove":
            policy.removed(name(some), evicted=False)
            present.discard(some)
            exposed.discard(some)
        victim = policy.victim()
        assert (victim is not None) == bool(exposed)
        if victim is not None:
            assert int.from_bytes(victim, "little") in exposed
        if action == "evict" and victim is not None:
            policy.removed(victim, evicted=True)
            present.discard(int.from_bytes(victim, "little"))
            exposed.discard(int.from_bytes(victim, "little"))
    drained = []
    while (victim := policy.victim()) is not None:
        policy.removed(victim, evicted=True)
        drained.append(int.from_bytes(victim, "little"))
    assert sorted(drained) == sorted(exposed)


@pytest.mark.parametrize("seed", range(3))
def test_lru_evicts_by_last_access(seed: int) -> None:
    rng = random.Random(seed)
    policy = Lru()
    order: list[int] = []  # the coldest first
    exposed: set[int] = set()
    for number in range(3000):
        action = rng.random()
        if action < 0.4 or not order:
            policy.admitted(name(number))
            order.append(number)
        elif action < 0.7:
            some = rng.choice(order)
            policy.accessed([name(some)])
            order.remove(some)
            order.append(some)
        elif action < 0.9:
            some = rng.choice(order)
            (policy.shielded if some in exposed else policy.exposed)(name(some))
            exposed ^= {some}
        else:
            victim = policy.victim()
            expected = next((each for each in order if each in exposed), None)
            assert victim == (None if expected is None else name(expected))
            if expected is not None:
                policy.removed(name(expected), evicted=True)
                order.remove(expected)
                exposed.discard(expected)


def test_a_hot_exposed_block_does_not_grow_the_heap() -> None:
    policy = Lru()
    policy.admitted(name(1))
    policy.exposed(name(1))
    for _ in range(10_000):
        policy.accessed([name(1)])
    assert len(policy._exposed._heap) < 200
