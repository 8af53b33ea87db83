"""Copies between host and device memory by the CUDA driver itself: a call costs a microsecond or two, where a tensor's costs thirty."""

from __future__ import annotations

import ctypes


class Dma:
    """Addresses are bytes. The calling thread must have made a CUDA device its own. RuntimeError for what the driver refuses."""

    def __init__(self) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        self._to_device, self._to_host = driver.cuMemcpyHtoDAsync_v2, driver.cuMemcpyDtoHAsync_v2
        for function in (self._to_device, self._to_host):
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
            function.restype = ctypes.c_int

    def to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Queues a copy; the source is registered host memory."""
        _check(self._to_device(target, source, num_bytes, stream))

    def to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Queues a copy; the target is registered host memory."""
        _check(self._to_host(target, source, num_bytes, stream))


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"the CUDA driver refused a copy: error {error}")
