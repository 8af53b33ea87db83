"""A store of a few slots with a clock and deaths that tests control, and real stores with real processes around them."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from cache_store.arena import Arena
from cache_store.client import StoreClient
from cache_store.config import StoreConfig
from cache_store.errors import StoreRefused
from cache_store.keys import BlockKey, Layout, hash_fields
from cache_store.outcomes import WatchEvent
from cache_store.process import StoreProcess
from cache_store.processes import ProcessIdentity, process_identity
from cache_store.store import Store
from cache_store.tiers.dram import DramTier

SECRET = "a secret"
ROOT = BlockKey(hash_fields("root", b"test"))
PART_BYTES = 2048
LAYOUT = Layout(codec="gqa", group=0, block_size=16, dtype="float32", num_parts=2, part_shape=(1, 2, 16, 16))
SLOT_BYTES = LAYOUT.block_bytes  # one granule
REPOSITORY = Path(__file__).resolve().parents[2]


def key(name: object) -> BlockKey:
    return BlockKey(hash_fields("block", str(name).encode()))


def chain(name: object, length: int) -> list[BlockKey]:
    return [key(f"{name}/{depth}") for depth in range(length)]


def parents_of(keys: list[BlockKey]) -> list[BlockKey]:
    return [ROOT, *keys[:-1]]


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeProcess:
    def __init__(self, on_exit: Callable[[], None], killed: list[int], pid: int) -> None:
        self.on_exit, self._killed, self._pid = on_exit, killed, pid
        self.is_open = True

    def kill(self) -> None:
        self._killed.append(self._pid)

    def close(self) -> None:
        self.is_open = False


class FakeWatcher:
    """Processes die when `die` says so; a kill is only noted."""

    def __init__(self) -> None:
        self.killed: list[int] = []
        self.dead: set[int] = set()
        self._watched: list[tuple[int, FakeProcess]] = []

    def watch(self, process: ProcessIdentity, on_exit: Callable[[], None]) -> FakeProcess:
        if process.pid in self.dead:
            raise StoreRefused(f"no process {process.pid}")
        watched = FakeProcess(on_exit, self.killed, process.pid)
        self._watched.append((process.pid, watched))
        return watched

    def die(self, pid: int) -> None:
        self.dead.add(pid)
        for watched_pid, process in list(self._watched):
            if watched_pid == pid and process.is_open:
                process.is_open = False
                process.on_exit()

    @property
    def num_open(self) -> int:
        return sum(process.is_open for _, process in self._watched)


class Kit:
    """One store over a real, small arena. `make` replaces it, as a restart would."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._num_made = 0
        self.store: Store
        self.clock = FakeClock()
        self.watcher = FakeWatcher()
        self.events: list[WatchEvent] = []
        self._next_pid = 1000

    def make(self, num_slots: int = 8, extent_slots: int = 4, **settings: object) -> Store:
        self.close()
        self.watcher, self.events = FakeWatcher(), []
        config = StoreConfig(
            memory_bytes=num_slots * SLOT_BYTES,
            extent_bytes=extent_slots * SLOT_BYTES,
            directory=str(self._directory),
            secret=SECRET,
            **settings,  # type: ignore[arg-type]
        )
        arena = Arena.create(config.directory, config.memory_bytes, config.extent_bytes)
        self.store = Store(
            config,
            lambda on_stored, on_removed: DramTier(arena, config, self.clock, on_stored=on_stored, on_removed=on_removed),
            self.watcher,
            self.clock,
            self.events.append,
        )
        while self.store.tier.grow():
            pass
        self._num_made += 1
        return self.store

    def attach(self, layout: Layout = LAYOUT, num_processes: int = 1) -> tuple[str, list[int]]:
        """A session id and its pids."""
        pids = list(range(self._next_pid, self._next_pid + num_processes))
        self._next_pid += num_processes
        return self.store.attach(layout, [(pid, 7) for pid in pids], f"engine-{pids[0]}").session_id, pids

    def put(self, session_id: str, keys: list[BlockKey], parents: list[BlockKey] | None = None) -> list[str]:
        """Reserves and commits; the reserve outcomes."""
        placed = self.store.reserve(session_id, keys, parents or parents_of(keys), 60.0)
        blocks = [(each, (0, 1), (1, 2)) for each, block in zip(keys, placed.blocks, strict=True) if block]
        self.store.commit(session_id, placed.lease_id, blocks)
        return [outcome.value for outcome in placed.outcomes]

    def advance(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.store.advance()

    def close(self) -> None:
        if self._num_made:
            self.store.close()
            self.store.tier.close()


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    kit = Kit(tmp_path)
    kit.make()
    yield kit
    assert kit.store.check() == []
    kit.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in shared memory that must be empty at the end."""
    directory = Path(tempfile.mkdtemp(prefix="store-test-", dir="/dev/shm"))
    try:
        yield directory
        left = sorted(path.name for path in directory.iterdir())
        assert left == [], f"left behind: {left}"
    finally:
        shutil.rmtree(directory)


def config_in(directory: Path, num_slots: int = 64, **settings: object) -> StoreConfig:
    fields = {"extent_bytes": 16 * SLOT_BYTES, "directory": str(directory), "secret": SECRET, **settings}
    return StoreConfig(memory_bytes=num_slots * SLOT_BYTES, **fields)  # type: ignore[arg-type]


@pytest.fixture
def store_process(shm: Path) -> Iterator[Callable[..., StoreProcess]]:
    """Starts a real store; stopped at the end."""
    started: list[StoreProcess] = []

    def start(num_slots: int = 64, **settings: object) -> StoreProcess:
        process = StoreProcess(config_in(shm, num_slots, **settings))
        started.append(process)
        process.start(timeout_s=30.0)
        return process

    yield start
    for process in started:
        process.stop()


def eventually(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.01)


async def eventually_async(condition: Callable[[], Awaitable[bool]], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {timeout_s} s"
        await asyncio.sleep(0.02)


class Child:
    """A Python process of a test, speaking lines. Ended and reaped by `close`."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    @property
    def identity(self) -> ProcessIdentity:
        return process_identity(self.process.pid)

    def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")

    def has_spoken(self) -> bool:
        """Whether a line waits to be heard."""
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def hear(self, timeout_s: float = 30.0) -> str:
        """The child's next line."""
        assert self.process.stdout
        readable, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        assert readable, f"the child has said nothing within {timeout_s} s"
        line: str = self.process.stdout.readline().decode().strip()
        assert line, f"the child has ended with {self.process.poll()}"
        return line

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10.0)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(script: str, *arguments: str) -> Child:
        children.append(Child(script, *arguments))
        return children[-1]

    yield start
    for each in children:
        each.close()


@pytest.fixture
def idle_child(child: Callable[..., Child]) -> Callable[[], Child]:
    """A process that waits to be killed, to be registered as somebody's writer."""
    return lambda: child("import sys; sys.stdin.read()")


def connect(process: StoreProcess, secret: str = SECRET, timeout_s: float = 5.0) -> StoreClient:
    return StoreClient(process.address, secret, timeout_s=timeout_s)
