"""Arena memory made known to a driver that notes what it hears."""

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from workers.kv import registration
from workers.kv.mapping import ArenaMapping
from workers.kv.registration import REGISTER_BYTES, Registration, pieces_of
from workers.step import ArenaSpec

NUM_PIECES = 3
NUM_BYTES = (NUM_PIECES - 1) * REGISTER_BYTES + 8192  # the last one is short
DATA_OFFSET = 4096
START = np.zeros(1, np.int64)


class Driver:
    """Registers nothing. `refused`: indices of pieces; while `gate` is clear every call waits."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        self.registered: dict[int, int] = {}
        self.num_calls = 0
        self.refused = refused
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.base: int | None = None

    def register(self, address: int, num_bytes: int) -> str:
        self.entered.set()
        assert self.gate.wait(20)
        self.num_calls += 1
        if self.num_calls - 1 in self.refused:
            return "no"
        assert all(stop <= address or address + num_bytes <= start for start, stop in self.ranges()), "registered twice"
        self.registered[address] = num_bytes
        return ""

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def ranges(self) -> list[tuple[int, int]]:
        return [(start, start + num_bytes) for start, num_bytes in self.registered.items()]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "GROWTH_PAUSE_S", 0.001)


@pytest.fixture
def path() -> Iterator[Path]:
    path = Path(f"/dev/shm/mobula-test-{os.getpid()}-{random.randrange(1 << 32)}")
    path.touch(mode=0o600)
    os.truncate(path, DATA_OFFSET + NUM_BYTES)
    yield path
    path.unlink()


def allocate(path: Path, num_bytes: int) -> None:
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, DATA_OFFSET + num_bytes)


def map_arena(path: Path, driver: Driver) -> ArenaMapping:
    return ArenaMapping(ArenaSpec(str(path), DATA_OFFSET + NUM_BYTES, DATA_OFFSET, 4096), driver)


def await_true(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_a_copy_registers_what_it_needs_once() -> None:
    driver = Driver()
    pieces = Registration(driver, 1000, NUM_BYTES, "arena")
    pieces.need(np.array([REGISTER_BYTES - 1]), 2)
    assert driver.registered == {1000: REGISTER_BYTES, 1000 + REGISTER_BYTES: REGISTER_BYTES}
    pieces.need(START, NUM_BYTES)
    assert driver.registered[1000 + 2 * REGISTER_BYTES] == 8192
    assert driver.num_calls == pieces.num_pieces == NUM_PIECES
    pieces.close()
    assert driver.registered == {}


def test_what_the_driver_refuses_is_not_asked_for_again() -> None:
    driver = Driver(refused=(1,))
    pieces = Registration(driver, 0, NUM_BYTES, "arena")
    pieces.need(START, NUM_BYTES)
    pieces.need(START, NUM_BYTES)
    assert driver.num_calls == NUM_PIECES
    assert len(driver.registered) == NUM_PIECES - 1
    pieces.close()
    assert driver.registered == {}


def test_threads_that_need_the_same_piece_register_it_once() -> None:
    driver = Driver()
    driver.gate.clear()
    pieces = Registration(driver, 0, NUM_BYTES, "arena")
    threads = [threading.Thread(target=pieces.need, args=(START, NUM_BYTES)) for _ in range(4)]
    for thread in threads:
        thread.start()
    driver.gate.set()
    for thread in threads:
        thread.join(20)
    assert driver.num_calls == NUM_PIECES


def test_a_mapping_is_registered_ahead_of_its_copies(path: Path) -> None:
    allocate(path, NUM_BYTES)
    driver = Driver()
    mapping = map_arena(path, driver)
    await_true(lambda: len(driver.registered) == NUM_PIECES)
    assert driver.registered[mapping.address + 2 * REGISTER_BYTES] == 8192
    mapping.retire()
    mapping.join(20)
    assert driver.registered == {}


def test_what_the_store_has_not_allocated_is_not_registered_ahead(path: Path) -> None:
    allocate(path, REGISTER_BYTES + 4096)
    driver = Driver()
    mapping = map_arena(path, driver)
    await_true(lambda: len(driver.registered) == 1)
    time.sleep(0.05)
    assert driver.num_calls == 1
    mapping.register(np.array([NUM_BYTES - 4096, NUM_BYTES - 8192]), 4096)
    assert driver.num_calls == 2, "a copy's piece is registered at once"
    allocate(path, NUM_BYTES)
    await_true(lambda: len(driver.registered) == NUM_PIECES)
    mapping.retire()
    mapping.join(20)
    assert driver.registered == {}


def test_a_mapping_that_retires_while_a_piece_is_registered(path: Path) -> None:
    allocate(path, NUM_BYTES)
    driver = Driver()
    driver.gate.clear()
    mapping = map_arena(path, driver)
    assert driver.entered.wait(20)
    assert mapping.use().release() is None, "nobody who copies waits for that"
    mapping.retire()
    assert mapping.data.nbytes == NUM_BYTES, "it stays mapped until then"
    driver.gate.set()
    mapping.join(20)
    assert driver.num_calls == 1, "no other piece is begun"
    assert driver.registered == {}
    assert not hasattr(mapping, "data")


def test_a_copy_that_outlives_its_mapping_keeps_the_registration(path: Path) -> None:
    allocate(path, NUM_BYTES)
    driver = Driver()
    mapping = map_arena(path, driver)
    mapping.use()
    mapping.retire()
    mapping.join(20)
    mapping.register(START, NUM_BYTES)
    assert len(driver.registered) == NUM_PIECES
    mapping.release()
    assert driver.registered == {}


def test_pieces_never_cross_a_registration() -> None:
    draw = random.Random(2)
    for num_bytes in (1, 4096, REGISTER_BYTES - 1, REGISTER_BYTES, 2 * REGISTER_BYTES + 5):
        starts = np.array([0, REGISTER_BYTES, *(draw.randrange(3 * REGISTER_BYTES) for _ in range(40))])
        begins, sizes, owners = (column.tolist() for column in pieces_of(starts, num_bytes))
        assert all(begin // REGISTER_BYTES == (begin + size - 1) // REGISTER_BYTES for begin, size in zip(begins, sizes, strict=True))
        for owner, start in enumerate(starts.tolist()):
            mine = [(begin, begin + size) for begin, size, of in zip(begins, sizes, owners, strict=True) if of == owner]
            assert [mine[0][0], mine[-1][1]] == [start, start + num_bytes]
            assert all(left[1] == right[0] for left, right in itertools.pairwise(mine))
