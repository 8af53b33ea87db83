"""Copies between host and device memory by the CUDA driver itself: a call costs a microsecond or two, where a tensor's costs thirty.

Where the driver takes a batch in one call (CUDA 13), it gets one: between two calls another thread may hold the interpreter's lock for
milliseconds.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes. Locations of type 0 say nothing."""

    _fields_ = (("order", ctypes.c_int), ("source", _Location), ("target", _Location), ("flags", ctypes.c_uint))


class Dma:
    """Addresses are bytes. The calling thread must have made a CUDA device its own. RuntimeError for what the driver refuses."""

    def __init__(self, driver: Any = None) -> None:
        """`driver`: libcuda."""
        driver = driver or ctypes.CDLL("libcuda.so.1")
        self._single = {False: driver.cuMemcpyHtoDAsync_v2, True: driver.cuMemcpyDtoHAsync_v2}
        for function in self._single.values():
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
            function.restype = ctypes.c_int
        self._batch = getattr(driver, "cuMemcpyBatchAsync_v2", None)
        if self._batch is not None:
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            self._batch.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer]
            self._batch.restype = ctypes.c_int

    def copy(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int, *, to_host: bool) -> None:
        """Queues copies, uint64 [N] each. What lies on the host is registered, each copy in one piece."""
        if self._batch is not None and len(sizes) > 1:
            attributes, first = _Attributes(_IN_STREAM_ORDER), ctypes.c_size_t(0)
            columns = [np.ascontiguousarray(column, np.uint64) for column in (targets, sources, sizes)]
            pointers = [column.ctypes.data for column in columns]
            error = self._batch(*pointers, len(sizes), ctypes.addressof(attributes), ctypes.addressof(first), 1, stream)
            if not error:
                return
            log.warning("the CUDA driver takes no batches of copies (error %d): they go one by one", error)
            self._batch = None
        single = self._single[to_host]
        for target, source, num_bytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            if error := single(target, source, num_bytes, stream):
                raise RuntimeError(f"the CUDA driver refused a copy: error {error}")
