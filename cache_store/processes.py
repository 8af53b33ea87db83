"""Processes named beyond doubt, and the kernel's word on when they are gone.

A pid is reused; a pid with its start time is not. A pidfd means one process for good: it turns readable when every thread of that process
has ended, after its memory is unmapped, and a signal through it reaches nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from cache_store.errors import StoreRefused

log = logging.getLogger(__name__)


class ProcessIdentity(NamedTuple):
    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat: clock ticks from boot to the start of the process


def process_identity(pid: int) -> ProcessIdentity:
    """The process that has this pid now. ProcessLookupError when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise ProcessLookupError(f"no process {pid}") from error
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses; these begin with field 3
    return ProcessIdentity(pid, int(fields[19]))


class WatchedProcess(Protocol):
    """One registration of one process; its owner closes it."""

    def kill(self) -> None:
        """Ends the process, stopped or not. Its exit is reported as any other."""
        ...

    def close(self) -> None:
        """No report comes after this."""
        ...


class ProcessWatcher(Protocol):
    def watch(self, process: ProcessIdentity, on_exit: Callable[[], None]) -> WatchedProcess:
        """Calls `on_exit` once when the process is gone, never from within this call. StoreRefused when there is no such process."""
        ...


class PidfdWatcher:
    """A ProcessWatcher on an asyncio loop. Costs nothing while nobody dies."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def watch(self, process: ProcessIdentity, on_exit: Callable[[], None]) -> WatchedProcess:
        if process.pid <= 1 or process.pid == os.getpid():
            raise StoreRefused(f"process {process.pid} cannot be registered: the store may have to kill it")
        try:
            fd = os.pidfd_open(process.pid)
        except OSError as error:
            raise StoreRefused(f"process {process.pid} cannot be registered: {error.strerror}") from error
        try:
            found = process_identity(process.pid)
        except ProcessLookupError:
            found = None
        if found != process:
            os.close(fd)
            raise StoreRefused(f"process {process.pid} is not the one that started at tick {process.start_ticks}")
        return _PidfdProcess(self._loop, process, fd, on_exit)


class _PidfdProcess:
    def __init__(self, loop: asyncio.AbstractEventLoop, process: ProcessIdentity, fd: int, on_exit: Callable[[], None]) -> None:
        self._loop = loop
        self._process = process
        self._fd = fd
        self._on_exit = on_exit
        loop.add_reader(fd, self._exited)

    def _exited(self) -> None:
        self.close()
        self._on_exit()

    def kill(self) -> None:
        if self._fd < 0:
            return
        try:
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # a zombie: the loop will report it
        except PermissionError:
            log.error("cannot kill process %d, which is past its deadline: its slots stay quarantined until it ends", self._process.pid)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
