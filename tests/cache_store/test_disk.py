"""The disk tier by itself: what it finds again, and what it takes for lost."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_store.checksums import part_checksums
from cache_store.config import GRANULE_BYTES
from cache_store.errors import StoreRefused
from cache_store.tiers.base import TierBlock
from cache_store.tiers.disk import DiskTier

LAYOUT = b"l" * 16
EXTENT = 4 * GRANULE_BYTES


def name(text: str) -> bytes:
    return text.encode().ljust(16, b".")


def block(key: str, parent: str | None = None, num_bytes: int = GRANULE_BYTES) -> TierBlock:
    data = random.Random(key).randbytes(num_bytes)
    return TierBlock(name(key), None if parent is None else name(parent), LAYOUT, part_checksums(data, 2), data)


class Disk:
    """One directory, whose tier is opened again and again; the one before is checked and closed first."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._opened: DiskTier | None = None

    def __call__(self, num_slots: int = 8, extent_bytes: int = EXTENT) -> DiskTier:
        self.close()
        self._opened = DiskTier(str(self.directory), num_slots * GRANULE_BYTES, extent_bytes)
        self._opened.restore()
        return self._opened

    def close(self) -> None:
        if self._opened is not None:
            assert self._opened.check() == []
            self._opened.close()
            self._opened = None


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


def test_blocks_are_there_after_a_restart(open_tier: Disk) -> None:
    tier = open_tier()
    blocks = [block("a"), block("b", "a"), block("c", "b", 3000), block("d", "a")]
    assert all(map(tier.write, blocks))
    tier.discard(name("d"))
    tier = open_tier()
    assert len(tier) == 3
    assert [tier.read(each.key, LAYOUT) for each in blocks] == [*blocks[:3], None]
    assert not tier.discard(name("a"))
    assert tier.write(block("d", "a"))
    assert tier.find([name("a"), name("b"), name("c")], LAYOUT) == 3
    assert tier.find([name("a")], b"m" * 16) == 0


def test_a_full_tier_evicts_after_a_restart_as_before(open_tier: Disk) -> None:
    tier = open_tier()
    assert all(tier.write(block(str(number))) for number in range(8))
    tier = open_tier()
    assert all(tier.write(block(f"new {number}")) for number in range(5))
    assert [tier.find([name(str(number))], LAYOUT) for number in range(8)] == [0] * 5 + [1] * 3
    tier = open_tier()
    assert len(tier) == 8
    assert tier.read(name("new 4"), LAYOUT) == block("new 4")


def test_a_smaller_tier_keeps_what_fits(open_tier: Disk) -> None:
    tier = open_tier()
    for number in range(8):
        tier.write(block(str(number), str(number - 1) if number else None))
    tier = open_tier(num_slots=4)
    kept = len(tier)
    assert 0 < kept <= 4
    assert [tier.read(name(str(number)), LAYOUT) is not None for number in range(8)] == [True] * kept + [False] * (8 - kept)
    assert len(open_tier()) == kept


def test_other_extents_begin_anew(open_tier: Disk) -> None:
    open_tier().write(block("a"))
    assert len(open_tier(extent_bytes=2 * EXTENT)) == 0


@pytest.mark.parametrize("damage", ["flipped", "short", "zeroed"])
def test_torn_bytes_are_a_miss_and_take_their_children_along(open_tier: Disk, tmp_path: Path, damage: str) -> None:
    tier = open_tier()
    for each in (block("a"), block("b", "a"), block("c", "b"), block("x")):
        assert tier.write(each)
    row = sqlite3.connect(tmp_path / "disk" / "blocks.sqlite")
    offset = row.execute("SELECT offset FROM blocks WHERE key = ?", (name("b"),)).fetchone()[0]
    row.close()
    with open(tmp_path / "disk" / "blocks.data", "r+b") as file:
        if damage == "short":
            file.truncate(offset + 100)
        else:
            file.seek(offset + 2000)
            file.write(b"\0" * 2000 if damage == "zeroed" else b"?")
    assert tier.read(name("b"), LAYOUT) is None
    assert tier.num_corrupt == 1
    assert tier.find([name("a"), name("b"), name("c")], LAYOUT) == 1
    assert len(tier) == 2
    if damage != "short":
        assert tier.read(name("a"), LAYOUT) == block("a")
    assert tier.write(block("b", "a"))
    assert tier.read(name("b"), LAYOUT) == block("b", "a")


def test_a_crash_between_the_bytes_and_the_row_loses_one_block(open_tier: Disk, tmp_path: Path) -> None:
    tier = open_tier()
    for number in range(8):
        assert tier.write(block(str(number)))
    tier.check()
    saved = (tmp_path / "disk" / "blocks.sqlite").read_bytes(), (tmp_path / "disk" / "blocks.sqlite-wal").read_bytes()
    assert tier.write(block("late"))  # in the slot of "0"
    open_tier.close()
    (tmp_path / "disk" / "blocks.sqlite").write_bytes(saved[0])
    (tmp_path / "disk" / "blocks.sqlite-wal").write_bytes(saved[1])
    tier = open_tier()
    assert tier.find([name("0")], LAYOUT) == 1
    assert tier.read(name("0"), LAYOUT) is None
    assert tier.read(name("1"), LAYOUT) == block("1")


def test_one_store_at_a_time(open_tier: Disk, tmp_path: Path) -> None:
    open_tier()
    with pytest.raises(StoreRefused, match="another store"):
        DiskTier(str(tmp_path / "disk"), 8 * GRANULE_BYTES, EXTENT)


@pytest.mark.parametrize("found", [b"what is this", b""])
def test_a_foreign_file_is_not_touched(tmp_path: Path, found: bytes) -> None:
    path = tmp_path / "blocks.sqlite"
    if found:
        path.write_bytes(found * 100)
    else:
        foreign = sqlite3.connect(path)
        foreign.execute("CREATE TABLE letters (text)")
        foreign.close()
    before = path.read_bytes()
    with pytest.raises(StoreRefused, match=r"not a store.s index"):
        DiskTier(str(tmp_path), 8 * GRANULE_BYTES, EXTENT)
    if found:
        assert path.read_bytes() == before
    else:
        foreign = sqlite3.connect(path)
        assert foreign.execute("SELECT count(*) FROM letters").fetchone() == (0,)
        foreign.close()


def test_a_damaged_index_begins_anew(open_tier: Disk) -> None:
    open_tier().write(block("a"))
    open_tier.close()
    path = open_tier.directory / "blocks.sqlite"
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 8000)
    tier = open_tier()
    assert len(tier) == 0
    assert tier.write(block("b"))
    assert tier.read(name("b"), LAYOUT) == block("b")


def test_many_threads(open_tier: Disk) -> None:
    tier = open_tier(num_slots=16)
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            number = rng.randrange(40)
            if rng.random() < 0.5:
                tier.write(block(str(number)))
            else:
                found = tier.read(name(str(number)), LAYOUT)
                if found is not None and found.data != block(str(number)).data:
                    wrong.append(str(number))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert wrong == []
    assert tier.num_corrupt == 0
    assert tier.check() == []
