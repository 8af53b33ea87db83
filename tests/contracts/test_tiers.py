"""Every tier of the table against the obvious one: the same answers to the same calls, and the same bytes back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_store.checksums import part_checksums
from cache_store.config import GRANULE_BYTES, StoreConfig
from cache_store.tiers.base import TIERS, Tier, TierBlock, open_tier

LAYOUT, OTHER_LAYOUT = b"l" * 16, b"m" * 16
NUM_SLOTS = 10


def name(text: str) -> bytes:
    return text.encode().ljust(16, b".")


def block(key: str, parent: str | None = None, *, layout: bytes = LAYOUT, num_bytes: int = GRANULE_BYTES, seed: int = 0) -> TierBlock:
    data = random.Random(f"{key} {seed}").randbytes(num_bytes)
    return TierBlock(name(key), None if parent is None else name(parent), layout, part_checksums(data, 2), data)


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    num_bytes = NUM_SLOTS * GRANULE_BYTES
    (tmp_path / "memory").mkdir()
    return StoreConfig(
        memory_bytes=num_bytes,
        extent_bytes=num_bytes,
        secret="x",
        directory=str(tmp_path / "memory"),
        eviction="lru",
        disk_bytes=num_bytes,
        disk_directory=str(tmp_path / "disk"),
    )


@pytest.fixture(params=sorted(TIERS))
def tier(request: pytest.FixtureRequest, config: StoreConfig) -> Iterator[Tier]:
    tier = open_tier(request.param, config)
    yield tier
    assert tier.check() == []
    tier.close()
    assert list(Path(config.directory).iterdir()) == []


@pytest.fixture
def oracle(config: StoreConfig) -> Tier:
    return open_tier("memory", config)


def test_what_was_written_is_read(tier: Tier) -> None:
    written = block("a", num_bytes=3000)
    assert tier.read(written.key, LAYOUT) is None
    assert tier.write(written)
    assert tier.read(written.key, LAYOUT) == written
    assert tier.write(block("b", "a"))
    assert tier.read(name("b"), LAYOUT) == block("b", "a")
    assert len(tier) == 2


def test_a_second_write_of_a_key_keeps_the_first(tier: Tier) -> None:
    assert tier.write(block("a"))
    assert tier.write(block("a", seed=1))
    assert tier.read(name("a"), LAYOUT) == block("a")
    assert len(tier) == 1


def test_layouts_do_not_mix(tier: Tier) -> None:
    assert tier.write(block("a"))
    assert tier.find([name("a")], OTHER_LAYOUT) == 0
    assert tier.read(name("a"), OTHER_LAYOUT) is None
    assert not tier.write(block("b", "a", layout=OTHER_LAYOUT))


def test_parents_first_and_leaves_first(tier: Tier) -> None:
    assert not tier.write(block("b", "a"))
    assert tier.write(block("a"))
    assert tier.write(block("b", "a"))
    assert not tier.discard(name("a"))
    assert tier.discard(name("b"))
    assert not tier.discard(name("b"))
    assert tier.discard(name("a"))
    assert len(tier) == 0


def test_find_counts_leading_keys(tier: Tier) -> None:
    tier.write(block("a"))
    tier.write(block("b", "a"))
    tier.write(block("d"))
    assert tier.find([name(each) for each in "abcd"], LAYOUT) == 2
    assert tier.find([], LAYOUT) == 0


def test_a_chain_longer_than_the_tier_stops_at_its_room(tier: Tier) -> None:
    chain = [block(str(depth), str(depth - 1) if depth else None) for depth in range(NUM_SLOTS + 3)]
    assert [tier.write(each) for each in chain] == [True] * NUM_SLOTS + [False] * 3
    assert tier.find([each.key for each in chain], LAYOUT) == NUM_SLOTS


def test_a_block_larger_than_the_tier_is_the_callers_mistake(tier: Tier) -> None:
    with pytest.raises(ValueError, match="larger"):
        tier.write(block("a", num_bytes=(NUM_SLOTS + 1) * GRANULE_BYTES))


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_agree_with_the_oracle(tier: Tier, oracle: Tier, seed: int) -> None:
    rng = random.Random(seed)
    chains = [[f"{number}/{depth}" for depth in range(rng.randrange(1, 7))] for number in range(8)]
    for _ in range(1500):
        chain = rng.choice(chains)
        depth = rng.randrange(len(chain))
        key = name(chain[depth])
        action = rng.choice(["write", "write", "write", "read", "find", "discard"])
        if action == "write":
            wanted = block(chain[depth], chain[depth - 1] if depth else None)
            assert tier.write(wanted) == oracle.write(wanted)
        elif action == "read":
            assert tier.read(key, LAYOUT) == oracle.read(key, LAYOUT)
        elif action == "find":
            keys = [name(each) for each in chain]
            assert tier.find(keys, LAYOUT) == oracle.find(keys, LAYOUT)
        else:
            assert tier.discard(key) == oracle.discard(key)
        assert len(tier) == len(oracle)
        assert tier.check() == []
