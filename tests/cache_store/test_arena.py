"""The arena's file and the slots in it."""

from __future__ import annotations

import logging
import os
import random
import socket
import stat
from array import array
from pathlib import Path

import pytest

from cache_store.arena import Arena, file_name, remove_stale
from cache_store.blocks import Block, new_block
from cache_store.config import GRANULE_BYTES, StoreConfig
from cache_store.errors import ArenaTooSmall
from cache_store.slots import Slot, SlotSpace


def test_the_file_is_private_locked_and_removed(tmp_path: Path) -> None:
    with Arena.create(str(tmp_path), 10 * GRANULE_BYTES + 5, 4 * GRANULE_BYTES) as arena:
        found = arena.path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_size == arena.total_bytes == arena.data_offset + 10 * GRANULE_BYTES
        assert arena.data_offset == GRANULE_BYTES
        assert remove_stale(str(tmp_path)) == []
        assert arena.path.exists()
    assert not arena.path.exists()
    arena.close()


def test_extents_open_one_by_one_and_the_last_may_be_short(tmp_path: Path) -> None:
    with Arena.create(str(tmp_path), 10 * GRANULE_BYTES, 4 * GRANULE_BYTES) as arena:
        sizes = []
        while (opened := arena.open_next()) is not None:
            start, num_bytes = opened
            assert start == sum(sizes)
            sizes.append(num_bytes)
            assert arena.path.stat().st_blocks * 512 >= arena.data_offset + arena.opened_bytes
        assert sizes == [4 * GRANULE_BYTES, 4 * GRANULE_BYTES, 2 * GRANULE_BYTES]
        data = random.Random(0).randbytes(5000)
        arena.write(4096, data)
        assert arena.read(4096, 5000) == data


def test_a_full_file_system_fails_at_the_start_with_the_missing_amount(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    free = space.f_bavail * space.f_frsize
    with pytest.raises(ArenaTooSmall, match=r"\d+ bytes \(\d+ MiB\) are missing.*--store-memory"):
        Arena.create(str(tmp_path), free + (1 << 30), 64 << 20)
    with pytest.raises(ArenaTooSmall):
        Arena.create(str(tmp_path / "nowhere"), GRANULE_BYTES, GRANULE_BYTES)
    assert remove_stale(str(tmp_path / "nowhere")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_fills_up_later_caps_the_arena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allocate = os.posix_fallocate

    def full(fd: int, offset: int, length: int) -> None:
        if offset > 6 * GRANULE_BYTES:
            raise OSError(28, "No space left on device")
        allocate(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Arena.create(str(tmp_path), 10 * GRANULE_BYTES, 4 * GRANULE_BYTES) as arena, caplog.at_level(logging.WARNING):
        assert arena.open_next() == (0, 4 * GRANULE_BYTES)
        assert arena.open_next() == (4 * GRANULE_BYTES, 4 * GRANULE_BYTES)
        assert arena.open_next() is None
        assert arena.num_bytes == 8 * GRANULE_BYTES
        assert arena.open_next() is None
    assert "--store-memory" in caplog.text


def test_stale_files_are_removed_and_only_those(tmp_path: Path) -> None:
    stale, served = tmp_path / file_name("sock"), tmp_path / file_name("sock")
    orphan = tmp_path / file_name("arena")
    orphan.write_bytes(b"left by a killed store")
    foreign = tmp_path / f"mobula-{os.getuid() + 1}-0123456789ab.arena"
    foreign.write_bytes(b"another user's")
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as listening:
        dead.bind(str(stale))
        listening.bind(str(served))
        listening.listen(1)
        for path in (stale, served):
            os.utime(path, (1.0, 1.0))
        with Arena.create(str(tmp_path), GRANULE_BYTES, GRANULE_BYTES) as arena:
            assert sorted(remove_stale(str(tmp_path))) == sorted([stale.name, orphan.name])
            assert {path.name for path in tmp_path.iterdir()} == {served.name, foreign.name, arena.path.name}


@pytest.mark.parametrize("seed", range(4))
def test_slots_of_many_sizes_never_overlap_and_generations_never_repeat(seed: int) -> None:
    rng = random.Random(seed)
    words = memoryview(array("Q", bytes(8 * 48)))
    space = SlotSpace(words)
    for start in range(0, 40, 16):
        space.add(start * GRANULE_BYTES, min(16, 40 - start) * GRANULE_BYTES)
    taken: list[tuple[Slot, int]] = []
    seen: set[tuple[int, int]] = set()
    refused = 0
    for _ in range(3000):
        if rng.random() < 0.55 or not taken:
            granules = rng.choice([1, 3, 8])
            owner: Block = new_block(b"k" * 16, b"l" * 16, granules * GRANULE_BYTES, 1, None)
            slot = space.take(granules * GRANULE_BYTES, owner)
            if slot is None:
                refused += 1
                slot, granules = taken.pop(rng.randrange(len(taken)))
                space.give_back(slot)
                continue
            assert words[slot.offset // GRANULE_BYTES] == slot.generation
            assert (slot.offset, slot.generation) not in seen
            seen.add((slot.offset, slot.generation))
            taken.append((slot, granules))
        else:
            slot, granules = taken.pop(rng.randrange(len(taken)))
            space.give_back(slot)
            assert words[slot.offset // GRANULE_BYTES] != slot.generation
        granules_taken = [slot.offset // GRANULE_BYTES + i for slot, granules in taken for i in range(granules)]
        assert len(set(granules_taken)) == len(granules_taken)
        assert all(granule < 40 for granule in granules_taken)
        assert space.check() == []
    assert refused > 10
    for slot, _ in taken:
        space.give_back(slot)
    assert space.num_free == 0  # all is back in the pool


@pytest.mark.parametrize(
    "wrong",
    [
        {"secret": ""},
        {"memory_bytes": 100},
        {"extent_bytes": 5000},
        {"eviction": "random"},
        {"max_sessions": 0},
        {"max_ttl_s": 0.0},
        {"address": "unix:/" + "x" * 120},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StoreConfig(**{"memory_bytes": 1 << 20, "secret": "x", **wrong})  # type: ignore[arg-type]


def test_settings_travel_as_one_line_and_do_not_show_the_secret() -> None:
    config = StoreConfig(memory_bytes=1 << 20, secret="quiet", address="unix:/run/store.sock")
    assert "\n" not in config.to_json()
    assert StoreConfig.from_json(config.to_json()) == config
    assert "quiet" not in repr(config)
    with pytest.raises(ValueError, match="settings"):
        StoreConfig.from_json('{"memory": 5}')
