"""Two nodes on one machine: a store each, the first with a disk, each the other's peer, and the replicas that use them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_store.client import StoreClient
from cache_store.config import StoreConfig
from cache_store.process import StoreProcess, StoreState
from tests.soak.chain_runner import BLOCK_SIZE, MAX_MODEL_LEN
from tests.soak.replica import SECRET

BLOCK_BYTES = 8192
ARENA_BLOCKS = 4 * MAX_MODEL_LEN // BLOCK_SIZE
START_TIMEOUT_S = 60.0
MARK = "MOBULA_SOAK_MARK"  # in the environment of every process of a run
REPOSITORY = Path(__file__).resolve().parents[2]


class Replica:
    """A replica's process and the thread that reads its lines: they go to `inbox` as (replica, message), its end as (replica, None)."""

    def __init__(self, name: str, store: StoreProcess, log: Path, inbox: queue.Queue[tuple[Replica, dict[str, Any] | None]]) -> None:
        self.name, self.open = name, dict[str, dict[str, Any]]()  # requests without an answer
        self.rank = 0  # its pid, once ready
        self._log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.replica", name, store.address],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1, cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            )  # fmt: skip
        self._inbox = inbox
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def is_ready(self) -> bool:
        return self.rank > 0

    def last_words(self) -> str:
        return self._log.read_text()[-2000:]

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has just died: its end is in the inbox, or comes
            self.process.stdin.write(json.dumps(message) + "\n")

    def close(self, timeout_s: float = 20.0) -> None:
        """Lets it end in order, if it is alive."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        if self.process.stdout:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            message = json.loads(line)
            if "ready" in message:
                self.rank = message["rank"]
            else:
                self._inbox.put((self, message))
        self._inbox.put((self, None))


class World:
    """Owner of every process. `close` ends them."""

    def __init__(self, memory: Path, disk: Path) -> None:
        self.inbox: queue.Queue[tuple[Replica, dict[str, Any] | None]] = queue.Queue()
        self.stores: list[StoreProcess] = []
        self.replicas: list[Replica] = []
        self._logs = disk
        self.nodes: dict[str, int] = {}  # replica's name -> its node
        self._num_named = 0
        for number in range(2):
            config = StoreConfig(
                memory_bytes=ARENA_BLOCKS * BLOCK_BYTES, extent_bytes=64 * BLOCK_BYTES, directory=str(memory), secret=SECRET,
                peer_address="127.0.0.1:0", disk_bytes=0 if number else 4 * ARENA_BLOCKS * BLOCK_BYTES, disk_directory=str(disk),
                peers=tuple(store.peer_address for store in self.stores),
            )  # fmt: skip
            self.stores.append(StoreProcess(config))
            self.stores[-1].start(START_TIMEOUT_S)
        for node in (0, 0, 1):
            self.start_replica(node)

    def wait_ready(self) -> None:
        """RuntimeError, with what it said last, when a replica cannot start."""
        wait_for(lambda: all(each.is_ready or each.process.poll() is not None for each in self.replicas), START_TIMEOUT_S)
        for replica in self.replicas:
            if not replica.is_ready:
                raise RuntimeError(f"{replica.name} does not start: {replica.last_words()}")

    def start_replica(self, node: int) -> None:
        self._num_named += 1
        name = f"replica-{self._num_named}"
        self.nodes[name] = node
        self.replicas.append(Replica(name, self.stores[node], self._logs / f"{name}.log", self.inbox))

    def replace(self, dead: Replica) -> None:
        """A replica that has ended gets a successor on the same node."""
        self.replicas.remove(dead)
        dead.close()
        self.start_replica(self.nodes[dead.name])

    async def tell_peers(self) -> None:
        """As the controller does: every store hears of all of them, again and again."""
        addresses = [store.peer_address for store in self.stores]
        for store in self.stores:
            if store.state is StoreState.READY:
                async with StoreClient(store.address, SECRET, timeout_s=2.0) as client:
                    await client.set_peers(addresses)

    def close(self) -> None:
        for replica in self.replicas:
            replica.close()
        for store in self.stores:
            store.stop()


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signals a process of this run; one that is gone, or another's that has its pid now, is left alone."""
    if pid in marked_processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def marked_processes() -> list[int]:
    """Live processes, other than this one, that inherited this run's mark."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                is_zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if mark in (entry / "environ").read_bytes().split(b"\0") and not is_zombie:
                    found.append(int(entry.name))
            except OSError:
                continue  # gone meanwhile, or not ours to look at
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True
