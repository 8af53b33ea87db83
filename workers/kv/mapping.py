"""The store's arena file, mapped into one rank.

The file begins with one 64-bit generation word for every GRANULE_BYTES of slot space: the slot at offset `o` from `data_offset` has word
`o // GRANULE_BYTES`. Reading it is one aligned load; around it lie calls of the interpreter, so nothing is reordered past it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import threading
from typing import TYPE_CHECKING

import numpy as np

from cache_store.config import GRANULE_BYTES
from workers.step import ArenaSpec

if TYPE_CHECKING:
    import numpy.typing as npt

log = logging.getLogger(__name__)

REGISTER_BYTES = 64 << 20  # of the arena, made known to CUDA at a time


class ArenaMapping:
    """One mapped arena file. `data` is uint8 [total_bytes - data_offset]. Stays mapped until `retire` and the last `release`.

    OSError when the file is missing or shorter than the spec says.
    """

    def __init__(self, spec: ArenaSpec) -> None:
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
        self._lock = threading.Lock()  # protects the three below
        self._num_users = 0
        self._retired = False
        self._registered: dict[int, bool] = {}  # by index of REGISTER_BYTES; False: CUDA refused

    def is_whole(self) -> bool:
        """Touching a mapped page beyond the end of its file is a bus error, so the length is asked before every copy."""
        return os.fstat(self._fd).st_size >= self.spec.total_bytes

    def generation(self, offset: int) -> int:
        return int(self.words[offset // GRANULE_BYTES])

    def holds(self, offset: int, num_bytes: int) -> bool:
        """Whether a slot of `num_bytes` can lie at `offset`."""
        aligned = offset >= 0 and offset % GRANULE_BYTES == 0
        return aligned and offset + num_bytes <= len(self.data) and offset // GRANULE_BYTES < len(self.words)

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
        self._retired = True
        self._close_if_unused()

    def register(self, start: int, stop: int) -> None:
        """Makes data[start:stop] known to CUDA, in pieces of REGISTER_BYTES, so that copies are DMA. Pieces are registered when first
        used (about 5 ms each): a whole arena would take seconds at attach and pin memory that no block lies in yet."""
        for index in range(start // REGISTER_BYTES, -(-stop // REGISTER_BYTES)):
            if index not in self._registered:
                with self._lock:
                    if index not in self._registered:  # by another thread meanwhile
                        self._registered[index] = self._host_register(index)

    def _host_register(self, index: int) -> bool:
        import torch

        first = index * REGISTER_BYTES
        piece = self.data[first : first + REGISTER_BYTES]
        error = torch.cuda.cudart().cudaHostRegister(piece.ctypes.data, piece.nbytes, 0)
        if int(error) != 0:
            log.warning("cudaHostRegister of %d bytes of %s failed (%s): copies there are slower", piece.nbytes, self.spec.path, error)
        return int(error) == 0

    def _close_if_unused(self) -> None:
        with self._lock:
            if self._num_users or not self._retired or self._fd < 0:
                return
            os.close(self._fd)
            self._fd = -1
            pieces = [index for index, registered in self._registered.items() if registered]
            if pieces:
                import torch

                for index in pieces:
                    torch.cuda.cudart().cudaHostUnregister(self.data[index * REGISTER_BYTES :].ctypes.data)
            del self.words, self.data
            with contextlib.suppress(BufferError):  # a view is still referred to: unmapped when that goes
                self._mmap.close()


def pieces_of(start: int, stop: int) -> list[tuple[int, int]]:
    """[start, stop) cut at multiples of REGISTER_BYTES: one DMA may not span two registrations."""
    cuts = [start, *range((start // REGISTER_BYTES + 1) * REGISTER_BYTES, stop, REGISTER_BYTES), stop]
    return list(itertools.pairwise(cuts))
