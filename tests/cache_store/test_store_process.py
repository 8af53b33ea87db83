"""The store's process and its supervisor: deaths on either side leave nothing behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cache_store.config import StoreConfig
from cache_store.errors import ArenaTooSmall, StoreRefused, StoreUnavailable
from cache_store.process import StoreProcess, StoreState
from cache_store.processes import process_identity
from tests.cache_store.conftest import LAYOUT, ROOT, SECRET, Child, config_in, connect, eventually, eventually_async, key

SUPERVISOR = """
import sys
from cache_store.config import StoreConfig
from cache_store.process import StoreProcess

process = StoreProcess(StoreConfig.from_json(sys.stdin.readline()))
process.start()
print(process.pid, process.address, flush=True)
sys.stdin.readline()
"""


def arenas(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.suffix == ".arena"}


def is_gone(pid: int, start_ticks: int) -> bool:
    try:
        return (
            process_identity(pid).start_ticks != start_ticks or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        )
    except (ProcessLookupError, FileNotFoundError):
        return True


async def test_a_killed_store_comes_back_at_its_address_with_a_new_epoch(
    store_process: Callable[..., StoreProcess], idle_child: Callable[[], Child], shm: Path
) -> None:
    process = store_process()
    writer = idle_child()
    address, first_pid, first_arena = process.address, process.pid, arenas(shm)
    async with connect(process) as client:
        attached = await client.attach(LAYOUT, [writer.identity], "engine")
        await client.reserve([key("a")], [ROOT], 60.0)
        os.kill(first_pid, signal.SIGKILL)
        eventually(lambda: process.state is StoreState.READY and process.pid != first_pid, 20.0, "a new store")
        assert process.address == address

        async def refuses() -> bool:
            try:
                await client.lookup([key("a")])
            except StoreUnavailable as error:
                return "attach again" in str(error)
            return False

        await eventually_async(refuses, 10.0, "the new store refusing an old session")
        again = await client.attach(LAYOUT, [writer.identity], "engine")
        assert again.epoch != attached.epoch
        assert again.arena_path != attached.arena_path
        assert (await client.stat()).held_slots == 0
        assert len(arenas(shm)) == 1
        assert not arenas(shm) & first_arena
        assert writer.process.poll() is None  # nobody was killed for the store's death


async def test_a_store_that_keeps_dying_is_restarted_each_time(store_process: Callable[..., StoreProcess]) -> None:
    process = store_process()
    for _ in range(3):
        pid = process.pid
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: process.pid != pid and process.state is StoreState.READY, 20.0, "a restart")  # type: ignore[misc]
        async with connect(process) as client:
            assert await client.check() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_orderly_end_removes_everything(child: Callable[..., Child], shm: Path, number: signal.Signals) -> None:
    server = child("from cache_store.server import main; import sys; sys.exit(main())")
    server.say(config_in(shm).to_json())
    assert server.hear().startswith(f"ready unix:{shm}/mobula-")
    assert len(list(shm.iterdir())) == 2
    server.send(number)
    assert server.process.wait(10.0) == 0
    assert list(shm.iterdir()) == []


def test_the_store_ends_with_its_killed_parent(child: Callable[..., Child], shm: Path) -> None:
    parent = child(SUPERVISOR)
    parent.say(config_in(shm, num_slots=160).to_json())
    pid, address = parent.hear().split()
    start_ticks = process_identity(int(pid)).start_ticks
    assert Path(address.removeprefix("unix:")).is_socket()
    parent.send(signal.SIGKILL)
    eventually(lambda: is_gone(int(pid), start_ticks), 10.0, "the end of the store")
    assert list(shm.iterdir()) == []


def test_stop_after_kill_removes_what_the_store_could_not(store_process: Callable[..., StoreProcess], shm: Path) -> None:
    process = store_process()
    process._backoff_s = (60.0, 60.0)  # it is not restarted before the stop
    os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: process.state is StoreState.RESTARTING, 10.0, "the supervisor noticing")
    process.stop()
    process.stop()
    assert process.state is StoreState.STOPPED
    assert list(shm.iterdir()) == []


def test_a_stopped_store_is_killed_in_the_end(store_process: Callable[..., StoreProcess], shm: Path) -> None:
    process = store_process()
    os.kill(process.pid, signal.SIGSTOP)
    process.stop()
    assert list(shm.iterdir()) == []


def test_the_reason_for_not_starting_reaches_the_parent(shm: Path) -> None:
    space = os.statvfs(shm)
    config = StoreConfig(memory_bytes=space.f_bavail * space.f_frsize + (1 << 30), directory=str(shm), secret=SECRET)
    with pytest.raises(ArenaTooSmall, match="--store-memory"), StoreProcess(config) as process:
        process.start(30.0)
    with pytest.raises(StoreRefused, match="address"), StoreProcess(config_in(shm, address="unix:/nowhere/at/all.sock")) as process:
        process.start(30.0)
    with pytest.raises(StoreUnavailable, match="ready"), StoreProcess(config_in(shm)) as process:
        process.start(0.001)


def test_the_secret_is_not_on_the_command_line(store_process: Callable[..., StoreProcess]) -> None:
    process = store_process()
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert sys.executable.encode() in command
    assert SECRET.encode() not in command
    assert SECRET.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes()


def test_an_idle_store_uses_no_processor(store_process: Callable[..., StoreProcess]) -> None:
    process = store_process()

    def ticks() -> int:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    samples: list[int] = []

    def quiet() -> bool:
        """Fifty samples, half a second, with at most one tick of 10 ms."""
        samples.append(ticks())
        return len(samples) >= 50 and samples[-1] - samples[-50] <= 1

    eventually(quiet, 10.0, "half a second of rest")
