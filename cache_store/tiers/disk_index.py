"""The disk tier's rows, in SQLite. Changes are queued in the order in which they happened, and written before the bytes they stand for."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cache_store.errors import StoreRefused

log = logging.getLogger(__name__)

APPLICATION_ID = 0x4D6F6275  # "Mobu": a file without it is not ours
FORMAT_VERSION = 1
FOREIGN = -1
_SCHEMA = """
CREATE TABLE blocks (number INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, parent BLOB, layout BLOB NOT NULL, offset INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL, checksums BLOB NOT NULL);
CREATE TABLE stamp (value INTEGER NOT NULL);
"""


class Row(NamedTuple):
    key: bytes
    parent: bytes | None
    layout: bytes  # digest; a block is found under this layout only
    offset: int
    num_bytes: int
    checksums: bytes


class DiskIndex:
    """Owner of the file. `insert` and `delete` only queue, under the tier's lock; `flush` writes, on any thread."""

    def __init__(self, path: Path, extent_bytes: int) -> None:
        """StoreRefused when the file is somebody else's. One of another version, or of other extents, is begun anew: it is a cache."""
        self.is_good = True  # False once a write has failed: blocks are then lost at a restart, not before
        self._changes: deque[Row | bytes] = deque()  # rows to insert, keys to delete
        self._lock = threading.Lock()  # protects the connection
        self._db = _open(path, FORMAT_VERSION << 40 | extent_bytes >> 12)

    def rows(self) -> Iterator[Row]:
        """What is stored, parents before children."""
        try:
            for row in self._db.execute("SELECT key, parent, layout, offset, num_bytes, checksums FROM blocks ORDER BY number"):
                yield Row(*row)
        except sqlite3.DatabaseError as error:
            log.warning("the disk's index is damaged: %s; keeping what could be read", error)

    def keys(self) -> set[bytes]:
        with self._lock:
            return {key for (key,) in self._db.execute("SELECT key FROM blocks")}

    def start(self, dropped: Sequence[bytes]) -> None:
        """Ends the restoring: the rows that were of no use are deleted with the next flush."""
        self._changes.extend(dropped)

    def insert(self, row: Row) -> None:
        self._changes.append(row)

    def delete(self, key: bytes) -> None:
        self._changes.append(key)

    def flush(self) -> None:
        """Returns when every change that was queued before the call is written."""
        if not self._changes:
            with self._lock:  # another thread may be writing the last of them
                return
        with self._lock:
            try:
                self._db.execute("BEGIN")
                while self._changes:
                    self._write(self._changes.popleft())
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self.is_good:
                    log.error("the disk's index cannot be written: %s; blocks will not be found again after a restart", error)
                self.is_good = False
                with contextlib.suppress(sqlite3.Error):  # the transaction may be gone already
                    self._db.execute("ROLLBACK")

    def close(self) -> None:
        self.flush()
        with self._lock:
            self._db.close()

    def _write(self, change: Row | bytes) -> None:
        if isinstance(change, Row):
            self._db.execute("INSERT INTO blocks (key, parent, layout, offset, num_bytes, checksums) VALUES (?, ?, ?, ?, ?, ?)", change)
        else:
            self._db.execute("DELETE FROM blocks WHERE key = ?", (change,))


def _open(path: Path, stamp: int) -> sqlite3.Connection:
    """A connection to an index with this stamp, perhaps an empty one."""
    try:
        db = _connect(path)
        try:
            found = _stamp_of(db)
        except sqlite3.DatabaseError:
            db.close()
            raise
        if found == stamp:
            return db
        if found is None:
            return _create(db, stamp)
        db.close()
        if found == FOREIGN:
            raise StoreRefused(f"disk_directory: {path} is not a store's index; choose another directory, or remove it")
        log.warning("%s was written by another version or with other extents: starting empty", path)
    except sqlite3.DatabaseError as error:
        if not _was_database(path):
            raise StoreRefused(f"disk_directory: {path} is not a store's index; choose another directory, or remove it") from error
        log.warning("%s cannot be read (%s): starting empty", path, error)
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    return _create(_connect(path), stamp)


def _connect(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing, a machine without power perhaps the last rows
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def _create(db: sqlite3.Connection, stamp: int) -> sqlite3.Connection:
    db.executescript(_SCHEMA)
    db.execute("INSERT INTO stamp VALUES (?)", (stamp,))
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    return db


def _stamp_of(db: sqlite3.Connection) -> int | None:
    """None for an empty database, FOREIGN for somebody else's."""
    if int(db.execute("PRAGMA application_id").fetchone()[0]) == APPLICATION_ID:
        return int(db.execute("SELECT value FROM stamp").fetchone()[0])
    return FOREIGN if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] else None


def _was_database(path: Path) -> bool:
    """Whether a file that SQLite cannot use has once been one of its."""
    with open(path, "rb") as file:
        return file.read(15) == b"SQLite format 3"
