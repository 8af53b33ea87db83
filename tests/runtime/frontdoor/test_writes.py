"""Writes that end by themselves, by their limit, and by somebody else."""

import asyncio
import time

import pytest

from runtime.errors import Overloaded
from runtime.frontdoor.writes import Writes

LIMIT_S = 0.1


class Window:
    """A client's: open or not."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.opened = asyncio.Event()
        self.taken: list[object] = []
        if is_open:
            self.opened.set()

    async def write(self, message: object) -> None:
        await self.opened.wait()
        self.taken.append(message)


async def test_a_full_window_ends_the_write_and_no_other() -> None:
    writes, full, slow = Writes(LIMIT_S), Window(), Window()
    began_s = time.monotonic()
    overdue = asyncio.create_task(writes.write(full, "lost"))
    await asyncio.sleep(LIMIT_S / 2)
    later = asyncio.create_task(writes.write(slow, "late"))
    with pytest.raises(Overloaded, match=r"taken nothing from its stream for 0\.1 s"):
        await overdue
    assert time.monotonic() - began_s >= LIMIT_S
    assert not later.done()
    slow.opened.set()
    await later
    assert (full.taken, slow.taken) == ([], ["late"])
    assert not overdue.cancelled()


async def test_one_task_writes_as_long_as_it_likes() -> None:
    writes, window = Writes(LIMIT_S), Window(is_open=True)
    for number in range(8):
        await writes.write(window, number)
        await asyncio.sleep(LIMIT_S / 4)
    assert window.taken == list(range(8))
    await asyncio.sleep(LIMIT_S)
    assert not writes._begun_s
    assert not writes._is_watching, "nothing is looked after while nothing is written"


async def test_who_cancels_a_write_is_heard() -> None:
    writes, window = Writes(LIMIT_S), Window()
    task = asyncio.create_task(writes.write(window, "x"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    late = asyncio.create_task(writes.write(window, "y"))
    await asyncio.sleep(0)
    writes._begun_s[late] -= 2 * LIMIT_S
    writes._look(asyncio.get_running_loop())
    late.cancel()  # in the same turn
    with pytest.raises(asyncio.CancelledError):
        await late
    assert not writes._begun_s
    assert not writes._overdue
