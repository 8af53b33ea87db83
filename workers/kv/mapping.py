"""The store's arena file, mapped into one rank.

The file begins with one 64-bit generation word for every GRANULE_BYTES of slot space: the slot at offset `o` from `data_offset` has word
`o // GRANULE_BYTES`. Reading it is one aligned load; around it lie calls of the interpreter, so nothing is reordered past it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from typing import TYPE_CHECKING

import numpy as np

from cache_store.config import GRANULE_BYTES
from workers.kv.registration import HostMemory, Registration
from workers.step import ArenaSpec

if TYPE_CHECKING:
    import numpy.typing as npt


class ArenaMapping:
    """One mapped arena file. `data` is uint8 [total_bytes - data_offset]. Stays mapped until `retire` and the last `release`.

    OSError when the file is missing or shorter than the spec says.
    """

    def __init__(self, spec: ArenaSpec, memory: HostMemory | None = None) -> None:
        """`memory` registers the arena, in the background and where `register` asks for it; None: that needs nobody."""
        if not 0 < spec.data_offset < spec.total_bytes or spec.data_offset % 8:
            raise OSError(f"{spec.path}: data cannot begin at {spec.data_offset} of {spec.total_bytes} bytes")
        self.spec = spec
        self._fd = os.open(spec.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not self.is_whole():
                raise OSError(f"{spec.path}: shorter than the {spec.total_bytes} bytes of the arena")
            self._mmap = mmap.mmap(self._fd, spec.total_bytes, mmap.MAP_SHARED)
        except OSError:
            os.close(self._fd)
            raise
        self.words: npt.NDArray[np.uint64] = np.frombuffer(self._mmap, np.uint64, spec.data_offset // 8)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._mmap, np.uint8, offset=spec.data_offset)
        self.address: int = self.data.ctypes.data  # of data[0]
        self._lock = threading.Lock()  # protects the user count and the end
        self._num_users = 0
        self._retired = threading.Event()
        self._registration = Registration(memory, self.address, len(self.data), spec.path) if memory is not None else None
        self._thread: threading.Thread | None = None
        if self._registration is not None:
            self.use()
            self._thread = threading.Thread(target=self._register_ahead, args=(self._registration,), name="arena-registration", daemon=True)
            self._thread.start()

    def is_whole(self) -> bool:
        """Touching a mapped page beyond the end of its file is a bus error, so the length is asked before every copy."""
        return os.fstat(self._fd).st_size >= self.spec.total_bytes

    def generations(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        return self.words[offsets // GRANULE_BYTES]

    def holds(self, offsets: npt.NDArray[np.int64], num_bytes: int) -> npt.NDArray[np.bool_]:
        """At which of them a slot of `num_bytes` can lie."""
        aligned = (offsets >= 0) & (offsets % GRANULE_BYTES == 0)
        within: npt.NDArray[np.bool_] = (offsets + num_bytes <= len(self.data)) & (offsets // GRANULE_BYTES < len(self.words))
        return aligned & within

    def use(self) -> ArenaMapping:
        with self._lock:
            self._num_users += 1
        return self

    def release(self) -> None:
        with self._lock:
            self._num_users -= 1
        self._close_if_unused()

    def retire(self) -> None:
        """No new users come; unmapped once those there are have gone."""
        self._retired.set()
        self._close_if_unused()

    def join(self, timeout_s: float) -> None:
        """After `retire`: returns when the background is done with the arena, which is after at most one piece."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def register(self, starts: npt.NDArray[np.int64], num_bytes: int) -> None:
        """Makes `num_bytes` of `data` from each start on known to CUDA, unless they are, so that copies are DMA."""
        assert self._registration is not None
        self._registration.need(starts, num_bytes)

    def _register_ahead(self, registration: Registration) -> None:
        try:
            registration.go_ahead(self._allocated_bytes, self._retired)
        finally:
            self.release()

    def _allocated_bytes(self) -> int:
        """Of `data`. The store allocates from its beginning on."""
        return os.fstat(self._fd).st_blocks * 512 - self.spec.data_offset

    def _close_if_unused(self) -> None:
        with self._lock:
            if self._num_users or not self._retired.is_set() or self._fd < 0:
                return
            os.close(self._fd)
            self._fd = -1
            if self._registration is not None:
                self._registration.close()
            del self.words, self.data
            with contextlib.suppress(BufferError):  # a view is still referred to: unmapped when that goes
                self._mmap.close()
