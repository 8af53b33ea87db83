"""Arena memory that CUDA knows: only from and to such memory is a copy a DMA.

Registering pins pages, and while the driver does it no kernel is launched: beside a running 8B model a piece held it up for as much as
8 ms, so pages are mapped before, outside the driver. It goes in pieces: ahead of the first copy on a thread that pauses between them, and
at once where a copy comes earlier. Pieces that the store has not allocated yet wait until it has, since pinning them would allocate them.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

log = logging.getLogger(__name__)

REGISTER_BYTES = 16 << 20  # a piece
PAUSE_FACTOR = 4  # times what a piece took, before the next
GROWTH_PAUSE_S = 0.5  # between two looks for pieces that the store has allocated
_MADV_POPULATE_WRITE = 23  # Linux 5.14


class HostMemory(Protocol):
    """The driver, as far as host memory goes. Any thread."""

    def register(self, address: int, num_bytes: int) -> str:
        """What was wrong; empty when nothing was."""
        ...

    def unregister(self, address: int) -> None: ...


class CudaHostMemory:
    def __init__(self, device: object) -> None:
        import torch

        self._torch, self._device = torch, device
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def register(self, address: int, num_bytes: int) -> str:
        self._libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE)  # no more than a help: an old kernel refuses
        with self._torch.cuda.device(self._device):  # type: ignore[no-untyped-call]  # or this thread would wake another card
            error = self._torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
        return "" if int(error) == 0 else str(error)

    def unregister(self, address: int) -> None:
        with self._torch.cuda.device(self._device):  # type: ignore[no-untyped-call]
            self._torch.cuda.cudart().cudaHostUnregister(address)


class Registration:
    """Which pieces of `num_bytes` at `address` are registered. `close` when nobody uses them and `go_ahead` has returned."""

    def __init__(self, memory: HostMemory, address: int, num_bytes: int, name: str) -> None:
        self._memory, self._address, self._num_bytes, self._name = memory, address, num_bytes, name
        self._lock = threading.Lock()  # held while a piece is registered; protects the one below
        self._pieces: dict[int, bool] = {}  # by index of REGISTER_BYTES; False: CUDA refused

    @property
    def num_pieces(self) -> int:
        """Registered, or refused."""
        return len(self._pieces)

    def need(self, starts: npt.NDArray[np.int64], num_bytes: int) -> None:
        """Returns once `num_bytes` from each start on are registered, or refused."""
        firsts, lasts = starts // REGISTER_BYTES, (starts + num_bytes - 1) // REGISTER_BYTES
        for first, last in sorted(set(zip(firsts.tolist(), lasts.tolist(), strict=True))):
            for index in range(first, last + 1):
                if index not in self._pieces:
                    self._register(index)

    def go_ahead(self, allocated_bytes: Callable[[], int], stopping: threading.Event) -> None:
        """Registers one piece after the other as far as they are allocated; returns after the last one, or soon after `stopping` is set."""
        pause_s = 0.0
        for index in range(-(-self._num_bytes // REGISTER_BYTES)):
            if index in self._pieces:
                continue
            while not stopping.wait(pause_s) and allocated_bytes() < min((index + 1) * REGISTER_BYTES, self._num_bytes):
                pause_s = GROWTH_PAUSE_S
            if stopping.is_set():
                return
            began_s = time.monotonic()
            self._register(index)
            pause_s = PAUSE_FACTOR * (time.monotonic() - began_s)

    def _register(self, index: int) -> None:
        with self._lock:
            if index in self._pieces:  # by another thread meanwhile
                return
            first = index * REGISTER_BYTES
            num_bytes = min(REGISTER_BYTES, self._num_bytes - first)
            error = self._memory.register(self._address + first, num_bytes)
            if error:
                log.warning("cudaHostRegister of %d bytes of %s failed (%s): copies there are slower", num_bytes, self._name, error)
            self._pieces[index] = not error

    def close(self) -> None:
        for index, is_registered in self._pieces.items():
            if is_registered:
                self._memory.unregister(self._address + index * REGISTER_BYTES)
        self._pieces.clear()


def pieces_of(starts: npt.NDArray[np.int64], num_bytes: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`num_bytes` from each start on, cut at multiples of REGISTER_BYTES: one DMA may not span two registrations. Starts and sizes of the
    pieces, and which of the given starts each is of."""
    first, last = starts // REGISTER_BYTES, (starts + num_bytes - 1) // REGISTER_BYTES
    if (first == last).all():
        return starts, np.full(len(starts), num_bytes, np.int64), np.arange(len(starts))
    counts = last - first + 1
    owners = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    cuts = (first[owners] + nth) * REGISTER_BYTES
    begins = np.maximum(starts[owners], cuts)
    return begins, np.minimum(starts[owners] + num_bytes, cuts + REGISTER_BYTES) - begins, owners
