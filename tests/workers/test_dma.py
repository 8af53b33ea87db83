"""Copies by a driver that does them at once, in this process's memory."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from workers.kv.dma import Dma


class Driver(SimpleNamespace):
    """`batch_error`: what a batch is answered with; None: there are no batches. `single_error` likewise."""

    def __init__(self, batch_error: int | None = 0, single_error: int = 0) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.cuMemcpyHtoDAsync_v2 = self.function("to device", self.single(single_error))
        self.cuMemcpyDtoHAsync_v2 = self.function("to host", self.single(single_error))
        if batch_error is not None:
            self.cuMemcpyBatchAsync_v2 = self.function("batch", self.batch(batch_error))

    def function(self, name: str, action: Callable[..., int]) -> Any:
        def call(*arguments: int) -> int:
            self.calls.append(name)
            return action(*arguments)

        return call

    def single(self, error: int) -> Callable[..., int]:
        def copy(target: int, source: int, num_bytes: int, stream: int) -> int:
            if not error:
                ctypes.memmove(target, source, num_bytes)
            return error

        return copy

    def batch(self, error: int) -> Callable[..., int]:
        def copy(targets: int, sources: int, sizes: int, count: int, attributes: int, firsts: int, num_attributes: int, stream: int) -> int:
            assert (num_attributes, ctypes.c_size_t.from_address(firsts).value) == (1, 0)
            assert list((ctypes.c_int * 6).from_address(attributes)) == [1, 0, 0, 0, 0, 0], "in the order of the stream"
            columns = [(ctypes.c_uint64 * count).from_address(column) for column in (targets, sources, sizes)]
            for target, source, num_bytes in zip(*columns, strict=True) if not error else ():
                ctypes.memmove(target, source, num_bytes)
            return error

        return copy


def copy_three(dma: Dma, count: int = 3) -> bool:
    source, target = np.arange(30, dtype=np.uint8), np.zeros(30, np.uint8)
    sizes = np.array([5, 7, 9])[:count]
    places = np.array([0, 8, 20])[:count]
    dma.copy(target.ctypes.data + places, source.ctypes.data + places, sizes, 0, to_host=False)
    expected = np.zeros(30, np.uint8)
    for place, size in zip(places, sizes, strict=True):
        expected[place : place + size] = source[place : place + size]
    return bool((target == expected).all())


def test_a_batch_is_one_call() -> None:
    driver = Driver()
    assert copy_three(Dma(driver))
    assert driver.calls == ["batch"]


def test_one_copy_is_no_batch() -> None:
    driver = Driver()
    assert copy_three(Dma(driver), count=1)
    assert driver.calls == ["to device"]


def test_a_driver_without_batches() -> None:
    driver = Driver(batch_error=None)
    assert copy_three(Dma(driver))
    assert driver.calls == ["to device"] * 3


def test_a_refused_batch_goes_one_by_one_from_then_on() -> None:
    driver = Driver(batch_error=801)
    dma = Dma(driver)
    assert copy_three(dma)
    assert copy_three(dma)
    assert driver.calls == ["batch"] + ["to device"] * 6


def test_a_refused_copy_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="error 700"):
        copy_three(Dma(Driver(batch_error=None, single_error=700)))
