"""The arena: one file in shared memory that holds every slot of a node's store.

    [generation words, one u64 per GRANULE_BYTES of slot space][slot space: extents of `extent_bytes`, the last one perhaps shorter]
                                                               ^ data_offset

The file has its full length at once but memory only where it was allocated: a write to a page that tmpfs cannot provide is a SIGBUS in
whoever writes, so a slot is handed out only after its extent was allocated. The file is locked while its store lives. One whose lock is
free has lost its store and is removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cache_store.config import GRANULE_BYTES
from cache_store.errors import ArenaTooSmall, StoreRefused

log = logging.getLogger(__name__)

_WORD_BYTES = 8
_ZEROS = bytes(1 << 20)
_CREATE_ATTEMPTS = 8
_CONNECT_TIMEOUT_S = 1.0
_SOCKET_GRACE_S = 10.0
_PROGRESS_EVERY_S = 5.0


def file_name(suffix: str) -> str:
    """A new name by which `remove_stale` knows the files of this user's stores."""
    return f"mobula-{os.getuid()}-{secrets.token_hex(6)}.{suffix}"


class Arena:
    """Owner of the file. `close` removes it; also a context manager. `open_next` may run on another thread than the rest.

    `words` are the generation words: the slot at offset o of the slot space has words[o // GRANULE_BYTES].
    """

    def __init__(self, path: Path, fd: int, num_bytes: int, extent_bytes: int) -> None:
        """Takes over a locked, empty file. Use `Arena.create`."""
        self.path = path
        self.num_bytes = num_bytes  # of the slot space
        self.data_offset = _data_offset(num_bytes)
        self.total_bytes = self.data_offset + num_bytes
        self.opened_bytes = 0  # of the slot space, allocated
        self._fd = fd
        self._extent_bytes = extent_bytes
        os.ftruncate(fd, self.total_bytes)
        os.posix_fallocate(fd, 0, self.data_offset)
        self._map = mmap.mmap(fd, self.total_bytes)
        self._data = memoryview(self._map)
        self.words = self._data[: self.data_offset].cast("Q")

    @classmethod
    def create(cls, directory: str, memory_bytes: int, extent_bytes: int) -> Arena:
        """A new arena of `memory_bytes` of slots, rounded down to granules, with no extent open. ArenaTooSmall when they do not fit.

        StoreRefused when the directory is not writable."""
        num_bytes = memory_bytes - memory_bytes % GRANULE_BYTES
        check_space(directory, _data_offset(num_bytes) + num_bytes)
        for _ in range(_CREATE_ATTEMPTS):
            path = Path(directory) / file_name("arena")
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError as error:
                raise StoreRefused(f"directory: cannot create {path}: {error.strerror}") from error
            if _locks(fd) and os.fstat(fd).st_nlink:  # another store, just starting, may have taken it for a stale one
                try:
                    return cls(path, fd, num_bytes, extent_bytes)
                except OSError as error:
                    path.unlink()
                    os.close(fd)
                    raise ArenaTooSmall(f"{path}: cannot allocate the arena: {error.strerror}; lower --store-memory") from error
            os.close(fd)
        raise ArenaTooSmall(f"{directory}: {_CREATE_ATTEMPTS} new arena files were removed by somebody else")

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def open_next(self, stopping: Callable[[], bool] = lambda: False) -> tuple[int, int] | None:
        """Allocates the next extent and touches all of it; blocks for as long as that takes (about 1 s per GiB).

        Returns its start and size in the slot space; None when there is no further one, when `stopping`, or when the file system is full:
        then the arena stays at what is open, with a warning.
        """
        start = self.opened_bytes
        num_bytes = min(self._extent_bytes, self.num_bytes - start)
        if num_bytes <= 0:
            return None
        try:
            os.posix_fallocate(self._fd, self.data_offset + start, num_bytes)
            for offset in range(start, start + num_bytes, len(_ZEROS)):
                if stopping():
                    return None
                length = min(len(_ZEROS), start + num_bytes - offset)
                os.pwrite(self._fd, memoryview(_ZEROS)[:length], self.data_offset + offset)
        except OSError as error:
            log.warning(
                "the arena %s stays at %d of %d bytes: %s. Free space in %s, or lower --store-memory",
                self.path, start, self.num_bytes, error.strerror, self.path.parent,
            )  # fmt: skip
            self.num_bytes = start
            return None
        self.opened_bytes = start + num_bytes
        return start, num_bytes

    def read(self, offset: int, num_bytes: int) -> bytes:
        """A copy of `num_bytes` at `offset` of the slot space."""
        return os.pread(self._fd, num_bytes, self.data_offset + offset)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        assert offset + len(data) <= self.opened_bytes
        os.pwrite(self._fd, data, self.data_offset + offset)

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """The bytes themselves, for reads and writes on threads. Whoever takes one releases it (`with`) before `close`."""
        assert offset + num_bytes <= self.opened_bytes
        return self._data[self.data_offset + offset : self.data_offset + offset + num_bytes]

    def close(self) -> None:
        """Removes the file; memory returns to the system when the last process unmaps it. Idempotent."""
        if self._fd < 0:
            return
        self.path.unlink(missing_ok=True)
        self.words.release()
        self._data.release()
        with contextlib.suppress(BufferError):  # a thread that did not end in time still copies: the process's end unmaps it
            self._map.close()
        os.close(self._fd)
        self._fd = -1


class ArenaGrower:
    """Opens the arena's extents one after the other on a thread, so that the store serves from the first ones meanwhile."""

    def __init__(self, arena: Arena, on_open: Callable[[int, int], object]) -> None:
        """`on_open(start, num_bytes)` is called on the thread."""
        self._arena = arena
        self._on_open = on_open
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="arena-grower", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        begun_s = told_s = time.monotonic()
        while not self._stop.is_set():
            opened = self._arena.open_next(self._stop.is_set)
            now_s = time.monotonic()
            if opened is not None:
                self._on_open(*opened)
            if opened is None or now_s - told_s > _PROGRESS_EVERY_S:
                told_s = now_s
                log.info(
                    "arena %s: %d of %d MiB are faulted in after %.1f s",
                    self._arena.path.name, self._arena.opened_bytes >> 20, self._arena.num_bytes >> 20, now_s - begun_s,
                )  # fmt: skip
            if opened is None:
                return

    def close(self) -> None:
        """Returns when the thread has ended: after at most the extent that it is allocating."""
        self._stop.set()
        self._thread.join()


def check_space(directory: str, num_bytes: int) -> None:
    """ArenaTooSmall, with the missing amount, when the file system of `directory` has less than `num_bytes` free."""
    try:
        space = os.statvfs(directory)
    except OSError as error:
        raise ArenaTooSmall(f"{directory}: {error.strerror}") from error
    free = space.f_bavail * space.f_frsize
    if free < num_bytes:
        missing = num_bytes - free
        raise ArenaTooSmall(
            f"{directory} has {free} bytes free and the arena needs {num_bytes}: {missing} bytes ({-(-missing // (1 << 20))} MiB) are "
            f"missing. Lower --store-memory, or give {directory} more space (Docker: --shm-size)"
        )


def remove_stale(directory: str) -> list[str]:
    """Removes what killed stores of this user left in `directory`: arenas that nobody locks, sockets that nobody serves. Returns names."""
    removed = []
    name = re.compile(rf"mobula-{os.getuid()}-[0-9a-f]+\.(arena|sock)")
    for path in Path(directory).glob("mobula-*"):  # none in a directory that does not exist
        if not name.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours after all
            if _is_stale_arena(path) if path.suffix == ".arena" else _is_stale_socket(path):
                path.unlink()
                removed.append(path.name)
    if removed:
        log.info("removed from %s what earlier stores left: %s", directory, ", ".join(sorted(removed)))
    return removed


def is_served(path: str) -> bool:
    """Whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # it is there and does not answer
        return True


def _is_stale_socket(path: Path) -> bool:
    found = path.lstat()
    is_new = time.time() - found.st_mtime < _SOCKET_GRACE_S  # its store has bound it, and may not have begun to listen
    return stat.S_ISSOCK(found.st_mode) and not is_new and not is_served(str(path))


def _is_stale_arena(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        return _locks(fd)
    finally:
        os.close(fd)


def _locks(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def _data_offset(num_bytes: int) -> int:
    words = num_bytes // GRANULE_BYTES * _WORD_BYTES
    return -(-words // GRANULE_BYTES) * GRANULE_BYTES
