"""Pages to and from an arena file, rank by rank, against the bytes that a block must have."""

import contextlib
import ctypes
import os
import random
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from cache_store.keys import Layout
from workers.kv.dma import Dma
from workers.kv.gates import LayerGates
from workers.kv.layout import PageLayout
from workers.kv.mapping import ArenaMapping
from workers.kv.movers import CudaMover, HostMover
from workers.kv.pool import PagePool
from workers.kv.registration import REGISTER_BYTES
from workers.kv.transfer import MAX_BATCH, PageCopier
from workers.step import ArenaSpec, BlockCopy, CopyResult

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NUM_SLOTS = 16
NUM_PAGES = 8
GENERATION = (1 << 63) + 5  # does not fit a signed word

GQA = Layout("gqa", 0, 4, "bfloat16", 4, (3, 2, 4, 8))
MLA = Layout("mla", 0, 4, "float32", 7, (4, 12))  # 7 layers divide by no tensor-parallel size


def page_layout(store: Layout, tp: int, rank: int) -> PageLayout:
    if store.codec == "gqa":
        num_parts = max(1, store.num_parts // tp)
        first = rank * store.num_parts // tp
        writes = rank % max(1, tp // store.num_parts) == 0
        return PageLayout(store, tp, rank, (num_parts, *store.part_shape), store.dtype, first, num_parts, first, num_parts if writes else 0)
    first, last = (store.num_parts * r // tp for r in (rank, rank + 1))
    return PageLayout(store, tp, rank, (store.num_parts, *store.part_shape), store.dtype, 0, store.num_parts, first, last - first)


class Arena:
    """The store's file, as the store would make it."""

    def __init__(self, path: Path, block_bytes: int) -> None:
        self.slot_bytes = -(-block_bytes // 4096) * 4096
        num_words = NUM_SLOTS * self.slot_bytes // 4096
        self.data_offset = -(-8 * num_words // 4096) * 4096
        self.total_bytes = self.data_offset + NUM_SLOTS * self.slot_bytes
        self.path = path
        path.write_bytes(bytes(self.total_bytes))
        self.words = np.memmap(path, np.uint64, "r+", shape=(num_words,))
        self.data = np.memmap(path, np.uint8, "r+", offset=self.data_offset)
        self.words[:] = GENERATION

    @property
    def spec(self) -> ArenaSpec:
        return ArenaSpec(str(self.path), self.total_bytes, self.data_offset, self.slot_bytes)

    def copy(self, copy_id: int, page: int, slot: int, checksums: bytes = b"", within_s: float = 60.0) -> BlockCopy:
        return BlockCopy(copy_id, page, slot * self.slot_bytes, GENERATION, time.monotonic() + within_s, checksums)

    def slot(self, index: int) -> np.ndarray:
        return self.data[index * self.slot_bytes :][: self.slot_bytes]


class Rank:
    def __init__(self, store: Layout, tp: int, rank: int, arena: Arena | None, device: torch.device = CPU, **kwargs: Any) -> None:
        self.layout = page_layout(store, tp, rank)
        self.pool = PagePool(self.layout, NUM_PAGES, device)
        self.copier = PageCopier(self.pool, self.layout, **kwargs)
        if arena is not None:
            self.copier.attach(arena.spec)

    def page(self, index: int) -> np.ndarray:
        """On the CPU a view, on CUDA a copy."""
        return self.pool.page_bytes(index).cpu().numpy()

    def write(self, index: int, content: np.ndarray) -> None:
        self.pool.page_bytes(index).copy_(torch.from_numpy(content))

    def wait(self, num_results: int) -> list[CopyResult]:
        """By way of the file descriptor, as the rank's loop does."""
        results: list[CopyResult] = []
        deadline_s = time.monotonic() + 20
        while len(results) < num_results:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"{len(results)} of {num_results} copies within 20 s"
            if select.select([self.copier], [], [], left_s)[0]:
                results += self.copier.results()
        return sorted(results)

    def one(self, loads: list[BlockCopy], saves: list[BlockCopy] | None = None) -> CopyResult:
        self.copier.submit(loads, saves or [])
        (result,) = self.wait(1)
        return result


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where a store's arena lies."""
    path = Path(f"/dev/shm/mobula-test-{os.getpid()}-{random.randrange(1 << 32)}")
    path.mkdir(mode=0o700)
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def make_rank(request: pytest.FixtureRequest) -> Iterator[type[Rank]]:
    ranks: list[Rank] = []

    def make(*args: object, **kwargs: Any) -> Rank:
        ranks.append(Rank(*args, device=torch.device(request.param), **kwargs))  # type: ignore[arg-type]
        return ranks[-1]

    yield make  # type: ignore[misc]
    for rank in ranks:
        rank.copier.close()
        rank.copier.close()


def random_block(store: Layout, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, store.block_bytes, np.uint8)


def part_of(block: np.ndarray, layout: PageLayout) -> np.ndarray:
    """What a rank's page holds of a block."""
    size = layout.store.part_bytes
    return block[layout.first_part * size : (layout.first_part + layout.num_parts) * size]


def checksums_of(block: np.ndarray, store: Layout) -> bytes:
    parts = block.reshape(store.num_parts, store.part_bytes)
    return b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(part.tobytes())) for part in parts)


@pytest.mark.parametrize("store", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_block_saved_at_one_size_loads_at_every_other(store: Layout, tp: int, folder: Path, make_rank: type[Rank]) -> None:
    arena = Arena(folder / "arena", store.block_bytes)
    writers = [make_rank(store, tp, rank, arena) for rank in range(tp)]
    blocks = [random_block(store, seed) for seed in range(NUM_PAGES - 1)]
    checksums = [b"" for _ in blocks]
    for writer in writers:
        for index, block in enumerate(blocks):
            writer.write(index + 1, part_of(block, writer.layout))
        writer.copier.submit([], [arena.copy(index, index + 1, 2 * index) for index in range(len(blocks))])
        for result in writer.wait(len(blocks)):
            assert result.ok
            assert len(result.checksums) == 8 * writer.layout.num_written_parts
            checksums[result.copy_id] += result.checksums
    for index, block in enumerate(blocks):
        assert arena.slot(2 * index)[: store.block_bytes].tobytes() == block.tobytes()
        assert not arena.slot(2 * index + 1).any(), "written beyond its slot"
        assert checksums[index] == checksums_of(block, store)

    for reader_tp in (1, 2, 4):
        for rank in range(reader_tp):
            reader = make_rank(store, reader_tp, rank, arena)
            loads = [arena.copy(index, NUM_PAGES - 1 - index, 2 * index, checksums_of(block, store)) for index, block in enumerate(blocks)]
            reader.copier.submit(loads, [])
            assert reader.wait(len(blocks)) == [CopyResult(index, True, b"") for index in range(len(blocks))]
            for index, block in enumerate(blocks):
                assert reader.page(NUM_PAGES - 1 - index).tobytes() == part_of(block, reader.layout).tobytes()
            assert not reader.page(0).any()


@pytest.fixture
def stored(folder: Path) -> tuple[Arena, np.ndarray]:
    """An arena with one GQA block in slot 3."""
    arena = Arena(folder / "arena", GQA.block_bytes)
    block = random_block(GQA, 11)
    arena.slot(3)[: GQA.block_bytes] = block
    return arena, block


def test_a_generation_changed_before_the_copy(stored: tuple[Arena, np.ndarray], make_rank: type[Rank]) -> None:
    arena, block = stored
    rank = make_rank(GQA, 1, 0, arena)
    rank.pool.page_bytes(2).fill_(7)
    arena.words[3 * arena.slot_bytes >> 12] += np.uint64(1)
    assert rank.one([arena.copy(1, 1, 3, checksums_of(block, GQA))]) == CopyResult(1, False, b"", "generation")
    assert not rank.page(1).any()
    assert rank.one([], [arena.copy(2, 2, 3)]) == CopyResult(2, False, b"", "generation")
    assert arena.slot(3)[: GQA.block_bytes].tobytes() == block.tobytes(), "a slot of somebody else was written"


@pytest.mark.parametrize("is_save", [False, True])
def test_a_generation_changed_during_the_copy(
    is_save: bool, stored: tuple[Arena, np.ndarray], make_rank: type[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, block = stored
    rank = make_rank(GQA, 1, 0, arena)
    digest = xxhash.xxh3_64_intdigest

    def digest_while_the_slot_changes_hands(data: bytes) -> int:
        arena.words[3 * arena.slot_bytes >> 12] = GENERATION + 1
        return digest(data)

    monkeypatch.setattr("workers.kv.movers.xxhash.xxh3_64_intdigest", digest_while_the_slot_changes_hands)
    copy = arena.copy(1, 1, 3, checksums_of(block, GQA)) if not is_save else arena.copy(1, 1, 3)
    result = rank.one([], [copy]) if is_save else rank.one([copy])
    assert result == CopyResult(1, False, b"", "generation")


def test_one_bad_byte_is_seen_by_the_rank_that_reads_it(stored: tuple[Arena, np.ndarray], make_rank: type[Rank]) -> None:
    arena, block = stored
    arena.slot(3)[3 * GQA.part_bytes + 5] ^= 1  # in the part of rank 1 of 2
    copy = arena.copy(1, 1, 3, checksums_of(block, GQA))
    assert make_rank(GQA, 2, 0, arena).one([copy]).ok
    assert make_rank(GQA, 2, 1, arena).one([copy]) == CopyResult(1, False, b"", "checksum")
    assert make_rank(GQA, 1, 0, arena).one([copy._replace(checksums=b"")]) == CopyResult(1, False, b"", "checksum")


def test_a_copy_past_its_deadline_touches_nothing(stored: tuple[Arena, np.ndarray], make_rank: type[Rank]) -> None:
    arena, block = stored
    rank = make_rank(GQA, 1, 0, arena)
    rank.pool.page_bytes(2).fill_(7)
    assert rank.one([arena.copy(1, 1, 3, checksums_of(block, GQA), within_s=-0.001)]) == CopyResult(1, False, b"", "deadline")
    assert rank.one([], [arena.copy(2, 2, 3, within_s=-0.001)]) == CopyResult(2, False, b"", "deadline")
    assert not rank.page(1).any()
    assert arena.slot(3)[: GQA.block_bytes].tobytes() == block.tobytes()


def test_an_arena_that_is_not_there(stored: tuple[Arena, np.ndarray], make_rank: type[Rank], folder: Path) -> None:
    arena, block = stored
    checksums = checksums_of(block, GQA)
    failed = CopyResult(1, False, b"", "arena")
    rank = make_rank(GQA, 1, 0, None)
    assert rank.one([arena.copy(1, 1, 3, checksums)]) == failed
    for bad in (
        arena.spec._replace(path=str(folder / "none")),
        arena.spec._replace(total_bytes=arena.total_bytes + 1),
        arena.spec._replace(data_offset=arena.total_bytes),
        arena.spec._replace(path="/dev/null"),
    ):
        rank.copier.attach(bad)
        assert rank.one([arena.copy(1, 1, 3, checksums)]) == failed
    rank.copier.attach(arena.spec)
    for offset in (-4096, 100, arena.total_bytes, NUM_SLOTS * arena.slot_bytes - 4096 + arena.slot_bytes, 1 << 60):
        assert rank.one([arena.copy(1, 1, 3, checksums)._replace(offset=offset)]) == failed
    assert rank.one([arena.copy(1, 1, 3, checksums)]).ok
    os.truncate(arena.path, arena.data_offset)
    assert rank.one([arena.copy(1, 1, 3, checksums)]) == failed
    assert rank.one([], [arena.copy(1, 1, 3)]) == failed


def test_a_removed_file_stays_readable_until_another_is_attached(
    stored: tuple[Arena, np.ndarray], make_rank: type[Rank], folder: Path
) -> None:
    arena, block = stored
    rank = make_rank(GQA, 1, 0, arena)
    rank.copier.results()
    arena.path.unlink()
    assert rank.one([arena.copy(1, 1, 3, checksums_of(block, GQA))]).ok
    other = Arena(folder / "other", GQA.block_bytes)
    rank.copier.attach(other.spec)
    assert rank.one([arena.copy(2, 2, 3, checksums_of(block, GQA))]) == CopyResult(2, False, b"", "checksum")
    rank.pool.page_bytes(4).fill_(9)
    assert rank.one([], [other.copy(3, 4, 5)]).ok
    assert (other.slot(5)[: GQA.block_bytes] == 9).all()


def test_copies_in_flight_keep_the_arena_they_were_asked_for(stored: tuple[Arena, np.ndarray], make_rank: type[Rank], folder: Path) -> None:
    arena, block = stored
    num_mapped = num_mappings(arena.path)
    rank = make_rank(GQA, 1, 0, arena)
    assert num_mappings(arena.path) > num_mapped
    checksums = checksums_of(block, GQA)
    other = Arena(folder / "other", GQA.block_bytes)
    first = [arena.copy(copy_id, 1 + copy_id % 7, 3, checksums) for copy_id in range(300)]
    rank.copier.submit(first, [])
    rank.copier.attach(other.spec)
    rank.copier.submit([other.copy(1000, 1, 3, checksums)], [])
    results = rank.wait(301)
    assert results[:300] == [CopyResult(copy_id, True, b"") for copy_id in range(300)]
    assert results[300] == CopyResult(1000, False, b"", "checksum")
    deadline_s = time.monotonic() + 10
    while num_mappings(arena.path) != num_mapped:  # let go just after the last result
        assert time.monotonic() < deadline_s, "the rank still holds the old arena"


def num_mappings(path: Path) -> int:
    """How often this process maps the file or has it open."""
    num_open = sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))
    return num_open + sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


def test_loads_do_not_wait_behind_saves_and_a_full_queue_says_busy(
    stored: tuple[Arena, np.ndarray], make_rank: type[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, block = stored
    rank = make_rank(GQA, 1, 0, arena, num_load_threads=2, max_queued_batches=4)
    digest = xxhash.xxh3_64_intdigest
    gate = os.eventfd(0)

    def digest_of_saves_waits(data: bytes) -> int:
        if threading.current_thread().name == "saves":
            os.eventfd_read(gate)
            os.eventfd_write(gate, 1)
        return digest(data)

    monkeypatch.setattr("workers.kv.movers.xxhash.xxh3_64_intdigest", digest_of_saves_waits)
    size = MAX_BATCH[rank.pool.tensor.device.type]
    rank.copier.submit([], [arena.copy(copy_id, 2, 4) for copy_id in range(7 * size)])
    busy = rank.wait(2 * size)  # one batch may be under way and four in the queue
    assert {result.reason for result in busy} == {"busy"}
    assert len(busy) % size == 0
    assert rank.one([arena.copy(100, 1, 3, checksums_of(block, GQA))]).ok
    os.eventfd_write(gate, 1)
    assert all(result.ok for result in rank.wait(7 * size - len(busy)))
    os.close(gate)


def test_what_has_been_taken_is_not_announced(
    stored: tuple[Arena, np.ndarray], make_rank: type[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the rank's loop would find its descriptor readable again and again, with nothing behind it."""
    arena, block = stored
    rank = make_rank(GQA, 1, 0, arena)
    write, takers, taken = os.eventfd_write, [], []

    def taken_meanwhile(fd: int, value: int) -> None:
        takers.append(threading.Thread(target=lambda: taken.append(rank.copier.results())))
        takers[-1].start()
        takers[-1].join(0.1)
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", taken_meanwhile)
    num_batches = rank.copier.submit([arena.copy(1, 1, 3, checksums_of(block, GQA))], [])
    rank.copier.await_loads(num_batches, 20.0)
    takers[0].join(20.0)
    assert [[result.ok for result in results] for results in taken] == [[True]]
    assert not select.select([rank.copier], [], [], 0)[0]


def test_loads_can_be_waited_for(stored: tuple[Arena, np.ndarray], make_rank: type[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until their results are there, whatever saves do; in vain when they take too long or their thread has ended."""
    arena, block = stored
    rank = make_rank(GQA, 1, 0, arena, num_load_threads=2)
    rank.copier.await_loads(rank.copier.submit([], []), 0.0)
    gate, judge = threading.Event(), PageCopier._judge

    def held(copier: PageCopier, *arguments: object) -> list[CopyResult]:
        assert gate.wait(20)
        return judge(copier, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PageCopier, "_judge", held)
    num_batches = rank.copier.submit([arena.copy(copy_id, copy_id, 3, checksums_of(block, GQA)) for copy_id in range(1, 6)], [])
    with pytest.raises(TimeoutError, match="batches of loads have taken longer than 0.05 s"):
        rank.copier.await_loads(num_batches, 0.05)
    threading.Timer(0.05, gate.set).start()
    rank.copier.await_loads(num_batches, 20.0)
    assert [result.ok for result in rank.copier.results()] == [True] * 5
    gate.clear()
    num_later = rank.copier.submit([arena.copy(6, 1, 3, checksums_of(block, GQA))], [])
    rank.copier.await_loads(num_batches, 0.0)  # not for those that came later
    gate.set()
    rank.copier.await_loads(num_later, 20.0)
    num_batches = rank.copier.submit([arena.copy(1, NUM_PAGES, 3, checksums_of(block, GQA))], [])  # there is no such page
    with pytest.raises(RuntimeError, match="copying pages failed: IndexError"):
        rank.copier.await_loads(num_batches, 20.0)


def test_a_forward_pass_waits_behind_loads_that_have_begun(
    stored: tuple[Arena, np.ndarray], make_rank: type[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whichever thread; not until they have ended, and for none that cannot begin."""
    arena, block = stored
    closed: list[list[tuple[object, ...]]] = []

    class Gates:
        def close_behind(self, arrivals: list[tuple[object, ...]]) -> None:
            closed.append(arrivals)

    assert not make_rank(GQA, 1, 0, arena).copier.gate_loads(0.0), "there are no gates"
    rank = make_rank(GQA, 1, 0, arena, gates=Gates(), num_load_threads=2)
    begins, ends, judge = threading.Event(), threading.Event(), PageCopier._judge
    movers = rank.copier._load_movers
    for mover in movers:
        if isinstance(mover, HostMover):
            mover.arrivals = (f"first run of {mover}", f"second run of {mover}")

        def begin(copies: list[BlockCopy], mapping: ArenaMapping, start: Callable[..., None] = mover.start) -> None:
            assert begins.wait(20)
            start(copies, mapping)

        monkeypatch.setattr(mover, "start", begin)

    def end(copier: PageCopier, *arguments: object) -> list[CopyResult]:
        assert ends.wait(20)
        return judge(copier, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PageCopier, "_judge", end)
    late = arena.copy(2, 2, 3, within_s=-1.0)
    num_batches = rank.copier.submit([arena.copy(1, 1, 3, checksums_of(block, GQA)), late], [])
    with pytest.raises(TimeoutError, match="1 batches of loads have taken longer than 1 s"):
        rank.copier.gate_loads(1.0)
    assert closed == []
    begins.set()
    assert rank.copier.gate_loads(20.0)
    assert closed == [list(zip(*(mover.arrivals for mover in movers), strict=True))]
    assert {len(run) for run in closed[0]} == {2}
    with pytest.raises(TimeoutError, match="1 batches of loads have taken longer than 0.05 s"):
        rank.copier.await_loads(num_batches, 0.05)
    ends.set()
    rank.copier.await_loads(num_batches, 20.0)
    assert [(result.copy_id, result.ok) for result in sorted(rank.copier.results())] == [(1, True), (2, False)]


class HostStream:
    """Does at once what it is told, in this process's memory."""

    cuda_stream = 0

    def __init__(self, *_: object, priority: int = 0) -> None:
        pass

    def synchronize(self) -> None:
        pass


class HostDma:
    def copy(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int, *, to_host: bool) -> None:
        for target, source, num_bytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(target, source, num_bytes)


class HostHasher:
    def __init__(self, data: np.ndarray, part_bytes: int, order: list[str]) -> None:
        self._data, self._part_bytes, self._order = data, part_bytes, order

    def put(self, offsets: np.ndarray) -> None:
        self._offsets, self._hashes = offsets, np.zeros(len(offsets), np.uint64)

    def start(self, first: int, stop: int) -> None:
        self._order.append("hashed")
        for part, offset in enumerate(self._offsets[first:stop].tolist(), first):
            self._hashes[part] = xxhash.xxh3_64_intdigest(self._data[offset : offset + self._part_bytes].tobytes())

    def finish(self, count: int) -> np.ndarray:
        return self._hashes[:count]


@pytest.mark.parametrize("store", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("tp", [1, 2])
def test_what_a_gpu_is_told_to_do(store: Layout, tp: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of layers after the other, parts hashed as they are whole, and what is hashed run by run is told block by block."""
    monkeypatch.setattr("workers.kv.layout._MIN_PIECE_BYTES", 1)
    arena = Arena(folder / "arena", store.block_bytes)
    blocks = [random_block(store, seed) for seed in range(3)]
    for index, block in enumerate(blocks):
        arena.slot(2 * index)[: store.block_bytes] = block
    rank = Rank(store, tp, tp - 1, None)
    layout, events = rank.layout, []
    order: list[str] = []

    class Event:
        def record(self, stream: object) -> None:
            events.append([rank.page(index + 1).tobytes() for index in range(3)])

        def synchronize(self) -> None:
            order.append("arrived")

    monkeypatch.setattr("torch.cuda.Stream", HostStream)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr("workers.kv.movers.Dma", HostDma)
    pool_bytes = rank.pool.tensor.view(torch.uint8).flatten().numpy()
    monkeypatch.setattr(CudaMover, "_make_hasher", lambda mover: HostHasher(pool_bytes, store.part_bytes, order))
    mapping = ArenaMapping(arena.spec)
    monkeypatch.setattr(mapping, "register", lambda starts, num_bytes: None)

    load = CudaMover(rank.pool, rank.copier._loads.route)
    copies = [arena.copy(index, index + 1, 2 * index) for index in range(3)]
    load.start(copies, mapping)
    first, stop = 8 * layout.first_part, 8 * (layout.first_part + layout.num_parts)
    assert load.finish(copies, mapping) == [checksums_of(block, store)[first:stop] for block in blocks]
    assert len(events) == len(load.arrivals) == len(layout.load_runs) > 2
    assert order == ["arrived", "hashed"] * sum(len(run.parts) > 0 for run in layout.load_runs)
    expected = np.zeros((len(blocks), layout.page_bytes), np.uint8)
    for run, pages in zip(layout.load_runs, events, strict=True):
        for block, page in zip(blocks, expected, strict=True):
            for start in run.starts:
                page[start : start + run.num_bytes] = part_of(block, layout)[start : start + run.num_bytes]
        assert pages == [page.tobytes() for page in expected]

    save = CudaMover(rank.pool, rank.copier._saves.route)
    copies = [arena.copy(index, index + 1, 2 * index + 1) for index in range(3)]
    order.clear()
    save.start(copies, mapping)
    first, size = layout.first_written_part, layout.num_written_parts
    assert save.finish(copies, mapping) == [checksums_of(block, store)[8 * first : 8 * (first + size)] for block in blocks]
    assert order == ["hashed"] * (size > 0)
    for index, block in enumerate(blocks):
        expected = np.zeros_like(block)
        written = slice(first * store.part_bytes, (first + size) * store.part_bytes)
        expected[written] = block[written]
        assert arena.slot(2 * index + 1)[: store.block_bytes].tobytes() == expected.tobytes()
    mapping.retire()
    rank.copier.close()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("store", [GQA, MLA], ids=["gqa", "mla"])
def test_a_captured_pass_reads_each_layer_when_it_is_there(store: Layout, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies that are held up in front of every run of layers. A pass that waits for nothing goes through at once."""
    monkeypatch.setattr("workers.kv.layout._MIN_PIECE_BYTES", 1)
    device = torch.device("cuda")
    arena, block = Arena(folder / "arena", store.block_bytes), random_block(store, 1)
    arena.slot(3)[: store.block_bytes] = block
    runs = page_layout(store, 1, 0).load_runs
    gates = LayerGates([run.first_layer for run in runs], device)
    rank = Rank(store, 1, 0, arena, device, gates=gates)
    layers = rank.pool.tensor[1] if store.codec == "mla" else rank.pool.tensor[1].transpose(0, 1)
    read = torch.zeros_like(layers)

    def run() -> None:
        for layer in range(len(layers)):
            gates.wait(layer)
            read[layer] = layers[layer]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    copy, loads = Dma.copy, [arena.copy(1, 1, 3, checksums_of(block, store))]
    assert rank.one(loads).ok, "what is slow the first time"

    def late(dma: Dma, *columns: np.ndarray, to_host: bool) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(columns[-1])):  # type: ignore[arg-type]
            torch.cuda._sleep(20_000_000)  # cycles: 10 ms
        copy(dma, *columns, to_host=to_host)  # type: ignore[arg-type]

    monkeypatch.setattr(Dma, "copy", late)
    for waits in (True, False, True):
        rank.pool.tensor.zero_()
        read.fill_(1)
        torch.cuda.synchronize()
        num_batches = rank.copier.submit(loads, [])
        if waits:
            assert rank.copier.gate_loads(20.0)
        graph.replay()
        torch.cuda.current_stream().synchronize()
        seen = (read if store.codec == "mla" else read.transpose(0, 1)).contiguous().cpu().view(torch.uint8).numpy().tobytes()
        assert seen == (block.tobytes() if waits else bytes(len(seen)))
        rank.copier.await_loads(num_batches, 20.0)
        assert [result.ok for result in rank.copier.results()] == [True]

    num_batches = rank.copier.submit(loads, [])
    assert rank.copier.gate_loads(20.0)
    gates.wait(0)
    is_there = torch.cuda.Event()
    is_there.record()
    is_there.synchronize()
    assert not all(mover.arrivals[-1].query() for mover in rank.copier._load_movers), "the first layer waits for no other"
    rank.copier.await_loads(num_batches, 20.0)
    rank.copier.close()


def test_closing_with_copies_in_the_queue(stored: tuple[Arena, np.ndarray]) -> None:
    arena, block = stored
    num_mapped = num_mappings(arena.path)
    rank = Rank(GQA, 1, 0, arena)
    rank.copier.submit([arena.copy(copy_id, 1, 3, checksums_of(block, GQA)) for copy_id in range(5000)], [])
    rank.copier.close()
    assert not any(thread.is_alive() for thread in rank.copier._threads)
    assert num_mappings(arena.path) == num_mapped


def test_an_error_in_a_copy_thread_reaches_the_rank(stored: tuple[Arena, np.ndarray], make_rank: type[Rank]) -> None:
    arena, block = stored
    rank = make_rank(GQA, 1, 0, arena)
    rank.copier.submit([arena.copy(1, NUM_PAGES, 3, checksums_of(block, GQA))], [])  # there is no such page
    with pytest.raises(RuntimeError, match="copying pages failed: IndexError"):
        rank.wait(1)


def test_random_copies_against_a_naive_model(folder: Path, make_rank: type[Rank]) -> None:
    draw = random.Random(7)
    arena = Arena(folder / "arena", MLA.block_bytes)
    ranks = [make_rank(MLA, 2, rank, arena) for rank in range(2)]
    stored: dict[int, np.ndarray] = {}
    for turn in range(150):
        slot, page = draw.randrange(NUM_SLOTS), draw.randrange(1, NUM_PAGES)
        if draw.random() < 0.5 or slot not in stored:
            block = random_block(MLA, turn)
            for rank in ranks:
                rank.write(page, part_of(block, rank.layout))
            results = [rank.one([], [arena.copy(turn, page, slot)]) for rank in ranks]
            assert b"".join(result.checksums for result in results) == checksums_of(block, MLA)
            stored[slot] = block
        else:
            block = stored[slot]
            checksums = checksums_of(block, MLA)
            wrong = draw.random() < 0.3
            if wrong:
                checksums = bytes(8) + checksums[8:]
            for rank in ranks:
                result = rank.one([arena.copy(turn, page, slot, checksums)])
                assert result.ok is not wrong
                assert wrong or rank.page(page).tobytes() == block.tobytes()


@needs_cuda
@pytest.mark.gpu
def test_saves_wait_for_the_forward_pass_and_loads_do_not(stored: tuple[Arena, np.ndarray]) -> None:
    arena, block = stored
    rank = Rank(GQA, 1, 0, arena, torch.device("cuda"))
    busy = torch.randn(8192, 8192, device="cuda")
    busy = busy @ busy / 100
    rank.pool.page_bytes(2).fill_(1)  # a kernel's first launch waits for those before it
    assert rank.one([arena.copy(0, 1, 3, checksums_of(block, GQA))]).ok
    torch.cuda.synchronize()
    for _ in range(100):  # about a second of work before the page is written
        busy = busy @ busy / 100
    rank.pool.page_bytes(2).fill_(7)
    rank.copier.submit([arena.copy(1, 1, 3, checksums_of(block, GQA))], [arena.copy(2, 2, 4), arena.copy(3, 2, 5, within_s=0.01)])
    assert rank.wait(1) == [CopyResult(1, True, b"")]
    assert not torch.cuda.current_stream().query(), "the load waited for the forward pass"
    saved, late = rank.wait(2)
    assert saved.ok
    assert (arena.slot(4)[: GQA.block_bytes] == 7).all()
    assert late == CopyResult(3, False, b"", "deadline"), "its slot would have been touched after the deadline"
    rank.copier.close()


@needs_cuda
@pytest.mark.gpu
def test_slots_across_registrations_of_an_arena(folder: Path) -> None:
    store = Layout("gqa", 0, 16, "bfloat16", 8, (128, 2, 16, 128))  # 8 MiB a block
    arena = Arena(folder / "arena", store.block_bytes)
    rank = Rank(store, 1, 0, arena, torch.device("cuda"))
    block = random_block(store, 5)
    for offset in (0, REGISTER_BYTES - 4096 * 100):  # the second spans two
        rank.write(1, block)
        saved = rank.one([], [arena.copy(1, 1, 0)._replace(offset=offset)])
        assert saved == CopyResult(1, True, checksums_of(block, store))
        assert rank.one([arena.copy(2, 2, 0, saved.checksums)._replace(offset=offset)]).ok
        assert rank.page(2).tobytes() == block.tobytes()
    assert rank.copier._mapping._registration._pieces[0] is rank.copier._mapping._registration._pieces[1] is True
    rank.copier.close()
