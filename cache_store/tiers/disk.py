"""The tier on disk: blocks that outlive the store.

    DIRECTORY/lock             held while a store uses the directory
    DIRECTORY/blocks.data      slots, as in the arena; sparse
    DIRECTORY/blocks.sqlite    one row per block: where it lies, its parent, its checksums

A row is deleted before its slot is written anew, and inserted after: a store that is killed in between has lost that block, no more.
The bytes are checked against the writer's checksums on every read, so whatever a crash of the machine has left of them is a miss. Books
are kept in memory under a lock that no I/O happens under; reads and writes may come from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cache_store.blocks import Block, BlockState, new_block
from cache_store.checksums import CHECKSUM_BYTES, is_intact
from cache_store.config import StoreConfig
from cache_store.errors import StoreRefused
from cache_store.tiers.base import TierBlock
from cache_store.tiers.disk_index import DiskIndex, Row
from cache_store.tiers.dram import SlotTier

log = logging.getLogger(__name__)

Done = Callable[[int, bytes | None], None]


def _ignore(_key: bytes) -> None:
    pass


class Described(NamedTuple):
    parent: bytes | None
    num_bytes: int
    checksums: bytes


class DiskTier:
    """Owner of the directory's files while it is open. LRU within the tier; after a restart in the order of writing.

    What an earlier store has left is there after `restore`, which may take a while (20 us a block); nothing is written before.
    """

    name = "disk"
    batch_bytes = 4 << 20

    def __init__(
        self,
        directory: str,
        num_bytes: int,
        extent_bytes: int,
        *,
        on_stored: Callable[[bytes], None] = _ignore,
        on_removed: Callable[[bytes], None] = _ignore,
    ) -> None:
        """`on_stored` and `on_removed` are called on the thread that wrote, and do not call back. StoreRefused when the directory cannot
        be used or another store uses it."""
        self.num_corrupt = self.num_failed_writes = 0
        self.num_bytes = num_bytes
        self._lock = threading.Lock()  # protects the books and the counters; never held during I/O
        self._on_stored, self._on_removed = on_stored, on_removed
        self._closing, self._restoring = threading.Event(), threading.Lock()
        self.is_restored = False
        with contextlib.ExitStack() as on_failure:
            self._lock_fd = _lock_directory(Path(directory))
            on_failure.callback(os.close, self._lock_fd)
            self._fd = os.open(Path(directory) / "blocks.data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            on_failure.callback(os.close, self._fd)
            os.ftruncate(self._fd, num_bytes)
            self._index = DiskIndex(Path(directory) / "blocks.sqlite", extent_bytes)
            on_failure.pop_all()
        self._slots = SlotTier(
            None, min(extent_bytes, num_bytes), "lru", time.monotonic, on_stored=self._note_stored, on_removed=self._note_removed
        )
        for start in range(0, num_bytes, extent_bytes):
            self._slots.slots.add(start, min(extent_bytes, num_bytes - start))

    @property
    def stored_bytes(self) -> int:
        return self._slots.stored_bytes

    @property
    def num_evicted(self) -> int:
        return self._slots.num_evicted

    def stored_keys(self) -> list[bytes]:
        """All that `find` can find."""
        with self._lock:
            return [key for key, block in self._slots.index.items() if block.state is BlockState.STORED]

    def restore(self) -> None:
        """Finds again what an earlier store has left. A row that does not fit (another size of the tier, a lost parent) is dropped. Other
        threads may look and read meanwhile."""
        begun_s = time.monotonic()
        dropped = []
        with self._restoring:
            for row in self._index.rows():
                if self._closing.is_set():
                    return
                with self._lock:
                    if not self._restore_row(row):
                        dropped.append(row.key)
            with self._lock:
                self._index.start(dropped)
                self.is_restored = True
        if len(self) or dropped:
            log.info("found %d blocks on disk in %.2f s, dropped %d", len(self), time.monotonic() - begun_s, len(dropped))

    def can_hold(self, num_bytes: int) -> bool:
        return self._slots.can_hold(num_bytes)

    def find(self, keys: Sequence[bytes], layout: bytes) -> int:
        with self._lock:
            return len(self._slots.leading(keys, layout))

    def touch(self, keys: Sequence[bytes], layout: bytes) -> list[bytes]:
        """Blocks were used in the arena, parents before children: what is warm there stays here too. Returns those that are not here."""
        with self._lock:
            blocks = [(key, self._slots.leading([key], layout)) for key in keys]
            self._slots.touch([block for _, found in blocks for block in found])
        return [key for key, found in blocks if not found]

    def describe(self, key: bytes, layout: bytes) -> Described | None:
        """What is known about a block without reading it."""
        with self._lock:
            blocks = self._slots.leading([key], layout)
            if not blocks:
                return None
            block = blocks[0]
            return Described(block.parent.key if block.parent else None, block.num_bytes, block.checksums.tobytes())

    def read(self, key: bytes, layout: bytes) -> TierBlock | None:
        described = self.describe(key, layout)
        if described is None:
            return None
        data = bytearray(described.num_bytes)
        if not self.read_into(key, layout, memoryview(data)):
            return None
        return TierBlock(key, described.parent, layout, described.checksums, bytes(data))

    def read_into(self, key: bytes, layout: bytes, view: memoryview) -> bool:
        """Reads a block's bytes. An access. False when it is not here (any more) or not intact: then it is forgotten."""
        with self._lock:
            blocks = self._slots.leading([key], layout)
            self._slots.touch(blocks)
            self._slots.pin(blocks)
        if not blocks:
            return False
        block = blocks[0]
        assert block.slot
        try:
            num_read = os.preadv(self._fd, [view], block.slot.offset) if len(view) == block.num_bytes else 0
            intact = num_read == block.num_bytes and is_intact(view, block.checksums.tobytes())
        except OSError as error:
            log.warning("cannot read block %s from disk: %s", key.hex(), error)
            intact = False
        with self._lock:
            self._slots.unpin(blocks)
            if not intact:
                self.num_corrupt += 1
                self._forget_below(block)
        return intact

    def load(self, keys: Sequence[bytes], layout: bytes, views: Sequence[memoryview], done: Done, timeout_s: float) -> None:
        """As a Source of `cache_store.promote`. The files are local: nothing here waits for anybody else."""
        for position, (key, view) in enumerate(zip(keys, views, strict=True)):
            described = self.describe(key, layout)
            if described is None or not self.read_into(key, layout, view):
                return  # what follows is of no use without it
            done(position, described.checksums)

    def write(self, block: TierBlock) -> bool:
        if not self.can_hold(len(block.data)):
            raise ValueError(f"a block of {len(block.data)} bytes is larger than an extent")
        if not self.is_restored:
            return False
        with self._lock:
            found = self._slots.index.get(block.key)
            if found is not None:
                if found.state is BlockState.STORED:
                    self._slots.touch([found])
                return found.state is BlockState.STORED
            made = self._place(block)
        if made is None:
            return False
        assert made.slot
        try:
            self._index.flush()  # the row of the slot's last block goes before its bytes do
            written = os.pwrite(self._fd, block.data, made.slot.offset) == len(block.data)
        except OSError as error:
            written = False
            if error.errno != errno.ENOSPC or not self.num_failed_writes:
                log.warning("cannot write a block to disk: %s", error)
        with self._lock:
            if written:
                self._slots.admit(made)
            else:
                self.num_failed_writes += 1
                self._slots.abandon(made, BlockState.ORPHANED)
                self._slots.free(made)
        self._index.flush()
        return written

    def discard(self, key: bytes) -> bool:
        with self._lock:
            gone = self._slots.discard(key)
        self._index.flush()
        return gone

    def __len__(self) -> int:
        return self._slots.num_stored

    def check(self) -> list[str]:
        with self._lock:
            problems = self._slots.check()
            stored = {key for key, block in self._slots.index.items() if block.state is BlockState.STORED}
        self._index.flush()
        rows = self._index.keys()
        with self._lock:
            same = stored == {key for key, block in self._slots.index.items() if block.state is BlockState.STORED}
        if same and self.is_restored and self._index.is_good and rows != stored:
            problems.append(f"the disk's index has {len(rows - stored)} blocks too many and lacks {len(stored - rows)}")
        return problems

    def close(self) -> None:
        """Leaves the blocks to the next store. No other call may be under way, but for `restore`, which ends early."""
        if self._fd < 0:
            return
        self._closing.set()
        with self._restoring:
            pass
        self._index.close()
        os.close(self._fd)
        os.close(self._lock_fd)
        self._fd = self._lock_fd = -1

    def _place(self, block: TierBlock) -> Block | None:
        parents = [] if block.parent is None else self._slots.leading([block.parent], block.layout)
        if block.parent is not None and not parents:
            return None
        checksums = array("Q", block.checksums)
        made = new_block(block.key, block.layout, len(block.data), len(checksums), parents[0] if parents else None)
        made.missing, made.checksums = 0, checksums
        return made if self._slots.place(made) else None

    def _forget_below(self, block: Block) -> None:
        """A block that cannot be read goes with all that hangs on it, as far as nobody uses it; what stays fails again when it is read."""
        doomed = [block]
        for each in doomed:
            doomed += each.children
        for each in reversed(doomed):
            self._slots.discard(each.key)

    def _restore_row(self, row: Row) -> bool:
        parents = [] if row.parent is None else self._slots.leading([row.parent], row.layout)
        if row.parent is not None and not parents:
            return False
        block = new_block(row.key, row.layout, row.num_bytes, len(row.checksums) // CHECKSUM_BYTES, parents[0] if parents else None)
        block.missing, block.checksums = 0, array("Q", row.checksums)
        if row.key in self._slots.index or not self._slots.place(block, row.offset):
            return False
        self._slots.admit(block)
        return True

    def _note_stored(self, key: bytes) -> None:
        block = self._slots.index[key]
        assert block.slot
        parent = block.parent.key if block.parent else None
        if self.is_restored:  # or the row is there already
            self._index.insert(Row(key, parent, block.layout, block.slot.offset, block.num_bytes, block.checksums.tobytes()))
        self._on_stored(key)

    def _note_removed(self, key: bytes) -> None:
        self._index.delete(key)
        self._on_removed(key)


def _lock_directory(directory: Path) -> int:
    """A file descriptor that holds the directory's lock."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreRefused(f"disk_directory: cannot use {directory}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StoreRefused(f"disk_directory: another store uses {directory}") from error
    return fd


def open_disk(config: StoreConfig) -> DiskTier:
    """With all that an earlier store has left."""
    tier = DiskTier(config.disk_directory, config.disk_bytes, config.extent_bytes)
    tier.restore()
    return tier
