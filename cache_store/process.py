"""A store in a child process that is restarted, at the same address, whenever it dies.

    STARTING --ready line--> READY --died--> RESTARTING --ready line--> READY ...        stop(): STOPPED, from every state

The child's stdin is a pipe that only this process holds: when this process ends in whatever way, the child sees the end of it, removes its
files and ends too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from cache_store.arena import is_served, remove_stale
from cache_store.config import StoreConfig, unix_path
from cache_store.errors import StoreError, StoreUnavailable
from cache_store.server import with_address
from cache_store.wire import ERRORS

log = logging.getLogger(__name__)

BACKOFF_S = (0.05, 5.0)  # first and longest wait before a restart
_STEADY_S = 30.0  # a child that lived so long starts the backoff anew
_STOP_TIMEOUT_S = 5.0
_KILL_TIMEOUT_S = 10.0


class StoreState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


class StoreProcess:
    """Owner of the child. `start`, then `stop` (or a with block around both); all methods may be called from any thread."""

    def __init__(self, config: StoreConfig, *, backoff_s: tuple[float, float] = BACKOFF_S) -> None:
        self._config = with_address(config)
        self._backoff_s = backoff_s
        self._state = StoreState.STARTING
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # protects the two above
        self._stopping = threading.Event()
        self._supervisor: threading.Thread | None = None
        self._start_timeout_s = 0.0

    def __enter__(self) -> StoreProcess:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return self._config.address

    @property
    def peer_address(self) -> str:
        """Where stores of other nodes pull from; empty when they may not."""
        return self._config.peer_address

    @property
    def pid(self) -> int:
        """Of the child there is now, or was last; 0 before the first."""
        child = self._child
        return child.pid if child else 0

    @property
    def state(self) -> StoreState:
        return self._state

    def start(self, timeout_s: float = 30.0) -> str:
        """Returns the address once the store serves. The error that the store has met, or StoreUnavailable after `timeout_s`."""
        self._start_timeout_s = timeout_s
        try:
            self._spawn()
        except (StoreError, OSError):
            self.stop()
            raise
        self._supervisor = threading.Thread(target=self._supervise, name="store-supervisor", daemon=True)
        self._supervisor.start()
        return self.address

    def stop(self) -> None:
        """Ends the child and removes what it owned. Idempotent."""
        self._stopping.set()
        with self._lock:
            self._state = StoreState.STOPPED
            if self._child is not None:
                _end(self._child)
        if self._supervisor is not None:
            self._supervisor.join(_KILL_TIMEOUT_S)
        if self._child is not None:
            _close_pipes(self._child)
        path = unix_path(self.address)
        if path is not None and not is_served(path):  # it may be another store's, when ours could not start
            Path(path).unlink(missing_ok=True)  # there still, when the child was killed
        with contextlib.suppress(FileNotFoundError):
            remove_stale(self._config.directory)

    def _supervise(self) -> None:
        backoff_s = self._backoff_s[0]
        while not self._stopping.is_set():
            child = self._child
            assert child
            since_s = time.monotonic()
            code = child.wait()
            _close_pipes(child)
            if time.monotonic() - since_s > _STEADY_S:
                backoff_s = self._backoff_s[0]
            with self._lock:
                if self._stopping.is_set():
                    return
                self._state = StoreState.RESTARTING
            log.warning("the store at %s has ended with code %d: restarting it in %.2f s", self.address, code, backoff_s)
            if self._stopping.wait(backoff_s):
                return
            backoff_s = min(2 * backoff_s, self._backoff_s[1])
            try:
                self._spawn()
            except (StoreError, OSError) as error:
                log.error("the store at %s cannot be restarted: %s", self.address, error)

    def _spawn(self) -> None:
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._lock:
            if self._stopping.is_set():
                return
            self._child = child = subprocess.Popen(
                [sys.executable, "-m", "cache_store.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                process_group=0,  # Ctrl-C at a terminal is for its owner, who ends it in order
            )
            assert child.stdin
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(self._config.to_json().encode() + b"\n")
                child.stdin.flush()
        try:
            line = _read_line(child, self._start_timeout_s)
        except StoreUnavailable:
            _end(child)
            raise
        word, _, rest = line.partition(" ")
        if word != "ready":
            _end(child)
            name, _, reason = rest.partition(" ")
            raise ERRORS.get(name, StoreUnavailable)(reason or "the store has ended before it was ready")
        with self._lock:
            address, _, peer_address = rest.partition(" ")
            self._config = dataclasses.replace(self._config, address=address, peer_address=peer_address)
            if not self._stopping.is_set():
                self._state = StoreState.READY


def _read_line(child: subprocess.Popen[bytes], timeout_s: float) -> str:
    """The child's first line; empty when it ended without one. StoreUnavailable at the deadline."""
    assert child.stdout
    fd = child.stdout.fileno()
    deadline_s = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))
        if not readable:
            raise StoreUnavailable(f"the store was not ready within {timeout_s:g} s")
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        line += chunk
    return line.decode(errors="replace").strip()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Asks, waits, kills."""
    if child.stdin and not child.stdin.closed:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
    try:
        child.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(_KILL_TIMEOUT_S)


def _close_pipes(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
