"""Writers that die or stop with slots in their hands, and readers beside them: real processes on one arena."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable

from cache_store.client import ReserveOutcome
from cache_store.process import StoreProcess
from tests.cache_store.conftest import LAYOUT, ROOT, SECRET, Child, connect, eventually_async, key

NUM_DEATHS = 100  # at least: more until readers have seen enough, which takes longer on a busy machine
MAX_DEATHS = 1000

# What every child does with slots. Content follows from the key, so that a reader can tell wrong bytes from right ones.
COMMON = """
import asyncio, mmap, os, random, select, struct, sys
import numpy as np, xxhash
from cache_store.client import CommitOutcome, ReserveOutcome, StoreClient
from cache_store.errors import StoreError
from cache_store.processes import process_identity
from tests.cache_store.conftest import LAYOUT, ROOT, key

PART, HALF = LAYOUT.part_bytes, LAYOUT.block_bytes // 2

def content(name):
    return random.Random(name).randbytes(LAYOUT.block_bytes)

def sums(data):
    return struct.pack("<2Q", *(xxhash.xxh3_64_intdigest(data[i * PART : (i + 1) * PART]) for i in range(2)))

class Arena:
    def __init__(self, attached):
        with open(attached.arena_path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), attached.arena_bytes)
        self.words = np.frombuffer(self.map, np.uint64, attached.data_offset // 8)
        self.base = attached.data_offset

    def write(self, offset, data):
        self.map[self.base + offset : self.base + offset + len(data)] = data

    async def read(self, slot, pause_s):
        # in two halves, with time in between for the slot to be taken away
        before = int(self.words[slot.offset >> 12])
        start = self.base + slot.offset
        data = self.map[start : start + HALF]
        if pause_s:
            await asyncio.sleep(pause_s)
        data += self.map[start + HALF : start + LAYOUT.block_bytes]
        after = int(self.words[slot.offset >> 12])
        return data if before == slot.generation == after and sums(data) == slot.checksums else None

async def attach(address, label):
    client = StoreClient(address, sys.argv[2])
    attached = await client.attach(LAYOUT, [process_identity(os.getpid())], label)
    return client, Arena(attached)
"""

HALF_WRITER = (
    COMMON
    + """
async def main():
    client, arena = await attach(sys.argv[1], "half writer")
    reserved = await client.reserve([key(i) for i in range(4)], [ROOT] * 4, float(sys.argv[3]))
    slot = reserved.slots[0]
    arena.write(slot.offset, b"x" * HALF)
    print(slot.offset, flush=True)
    sys.stdin.readline()
    arena.write(slot.offset + HALF, b"y" * HALF)
    print("wrote on", flush=True)

asyncio.run(main())
"""
)

# Forks a writer for every line it hears: a hundred of them cost one start of an interpreter. gRPC begins to run in the children only.
NURSERY = (
    COMMON
    + """
import signal

async def main():
    rng = random.Random(os.getpid())
    client, arena = await attach(sys.argv[1], f"writer {os.getpid()}")
    while True:
        names = rng.sample(range(200), 6)
        reserved = await client.reserve([key(name) for name in names], [ROOT] * 6, 0.5)
        blocks = []
        for name, slot in zip(names, reserved.slots):
            if slot.outcome is ReserveOutcome.RESERVED:
                data = content(name)
                for start in range(0, len(data), 64):
                    arena.write(slot.offset + start, data[start : start + 64])
                blocks.append((key(name), [0, 1], sums(data)))
        if blocks:
            await client.commit(reserved.lease_id, blocks)
            await client.release([reserved.lease_id])

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
print("open", flush=True)
while sys.stdin.readline():
    pid = os.fork()
    if not pid:
        asyncio.run(main())
    print(pid, flush=True)
"""
)

READER = (
    COMMON
    + """
async def main():
    rng = random.Random(1)
    client, arena = await attach(sys.argv[1], "reader")
    good = refused = wrong = 0
    enough = False
    print("reading", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        name = rng.randrange(200)
        acquired = await client.acquire([key(name)], 0.002)  # too short on purpose
        for slot in acquired.slots:
            data = await arena.read(slot, rng.choice([0] * 9 + [0.05]))
            if data is None:
                refused += 1
            elif data == content(name):
                good += 1
            else:
                wrong += 1
        if not enough and good > 100 and refused:
            enough = True
            print("enough", flush=True)
    print(good, refused, wrong, flush=True)

asyncio.run(main())
"""
)


async def test_a_writer_killed_between_reserve_and_commit_leaves_nothing(
    store_process: Callable[..., StoreProcess], child: Callable[..., Child]
) -> None:
    process = store_process(num_slots=16)
    async with connect(process) as client:
        writer = child(HALF_WRITER, process.address, SECRET, "60")
        writer.hear()
        assert (await client.stat()).held_slots == 4
        writer.send(signal.SIGKILL)

        async def all_back() -> bool:
            stat = await client.stat()
            return (stat.held_slots, stat.sessions, stat.leases) == (0, 0, 0)

        await eventually_async(all_back, 5.0, "the return of a dead writer's slots")
        assert (await client.stat()).killed_holders == 0
        assert await client.check() == []


async def test_a_writer_stopped_in_the_middle_of_a_slot_is_killed_before_anybody_gets_the_slot(
    store_process: Callable[..., StoreProcess], child: Callable[..., Child], idle_child: Callable[[], Child]
) -> None:
    process = store_process(num_slots=16, kill_grace_s=0.2)
    async with connect(process) as client:
        writer = child(HALF_WRITER, process.address, SECRET, "0.5")
        offset = int(writer.hear())
        writer.send(signal.SIGSTOP)
        writer.say("go on")  # it would write its second half, were it ever to run again
        await client.attach(LAYOUT, [idle_child().identity], "next")
        others = [key(f"other {i}") for i in range(16)]
        early = await client.reserve(others, [ROOT] * 16, 60.0)
        assert [slot.outcome for slot in early.slots].count(ReserveOutcome.RESERVED) == 12
        assert offset not in {slot.offset for slot in early.slots if slot.outcome is ReserveOutcome.RESERVED}

        async def killed() -> bool:
            stat = await client.stat()
            return stat.killed_holders == 1 and stat.quarantined_slots == 0

        await eventually_async(killed, 5.0, "the end of the stopped writer")
        assert (await client.stat()).held_slots == 12
        late = await client.reserve(others[12:], [ROOT] * 4, 60.0)
        assert offset in {slot.offset for slot in late.slots}
        with open(f"/proc/{writer.process.pid}/stat", encoding="utf-8") as stat:  # noqa: ASYNC230
            assert stat.read().rpartition(")")[2].split()[0] == "Z"
        writer.send(signal.SIGCONT)  # a zombie does not care
        assert writer.process.wait(5.0) == -signal.SIGKILL
        assert writer.process.stdout
        assert writer.process.stdout.read() == b""
        assert await client.check() == []


async def test_a_hundred_deaths_in_the_middle_of_writes_cost_no_slot_and_no_byte(
    store_process: Callable[..., StoreProcess], child: Callable[..., Child]
) -> None:
    process = store_process(num_slots=24, kill_grace_s=0.1)
    rng = random.Random(3)
    reader, nursery = child(READER, process.address, SECRET), child(NURSERY, process.address, SECRET)
    assert (reader.hear(), nursery.hear()) == ("reading", "open")
    with contextlib.ExitStack() as stack:
        async with connect(process) as client:
            for death in range(MAX_DEATHS):
                if death >= NUM_DEATHS and reader.has_spoken():
                    break
                nursery.say("fork")
                writer = os.pidfd_open(int(nursery.hear()))
                stack.callback(os.close, writer)
                committed = (await client.stat()).committed_blocks

                async def in_the_middle(committed: int = committed) -> bool:
                    stat = await client.stat()
                    return stat.committed_blocks > committed and stat.held_slots > 0

                await eventually_async(in_the_middle, 10.0, "a write under way")
                number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
                signal.pidfd_send_signal(writer, number)
                if number is signal.SIGSTOP:
                    stack.callback(_kill, writer)  # unless it held slots: then the store does

            async def nothing_held() -> bool:
                return (await client.stat()).held_slots == 0

            await eventually_async(nothing_held, 10.0, "the return of every slot")
            stat = await client.stat()
            assert (stat.quarantined_slots, await client.check()) == (0, [])
            assert stat.killed_holders > 0  # some were stopped in the middle, or the test shows nothing
        # readers did meet good slots and slots that were taken away, or the test shows nothing
        assert reader.hear() == "enough"
        reader.say("stop")
        good, refused, wrong = map(int, reader.hear().split())
    assert wrong == 0, (good, refused, wrong)


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
