"""Rank processes with a real model: the way from a plan to tokens, and from pages through an arena to pages of another group."""

import json
import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from workers.answers import AnswerThread
from workers.config import WorkerConfig
from workers.errors import GroupFailed, UnknownArchitecture
from workers.group import GroupListener, RankGroup
from workers.local import RankPool
from workers.step import ArenaSpec, BlockCopy, CopyResult, NewRow, RowResult, SamplingSettings, StepPlan, StepResult, StepRow
from workers.wire import LENGTH, CopiesDone, decode
from workers.worker import MODEL, Rank, load_attribute, pick_device, run_rank

ROOT = Path(__file__).parents[2]
SECRET = "s3cret"
BLOCK_SIZE = 4
DATA_OFFSET = 4096
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
PROMPT = [(7 * index) % 89 + 1 for index in range(14)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, env={"PYTHONPATH": str(ROOT)}) as pool:
        yield pool


def config(model: str, tp: int, **changes: object) -> WorkerConfig:
    settings = {"load_format": "dummy", "seed": 3, "device": "cpu", "block_size": BLOCK_SIZE, "kv_memory_bytes": 1 << 20, "max_num_seqs": 4}
    return WorkerConfig(model=model, tensor_parallel_size=tp, **{**settings, **changes})


class Driver:
    """Says plans to a group and waits for their results."""

    def __init__(self, pool: RankPool, worker: WorkerConfig) -> None:
        self._listener = GroupListener(worker.tensor_parallel_size, secret=SECRET)
        pool.serve(self._listener.address, worker.tensor_parallel_size, SECRET)
        self.group: RankGroup = self._listener.accept(60, check=pool.check)
        self.phases: set[tuple[int, str]] = set()
        self.group.load(worker, lambda rank, phase, done, total: self.phases.add((rank, phase)), timeout_s=120)
        self._sequence = 0

    def step(
        self, rows: list[StepRow], rows_in: tuple[NewRow, ...] = (), loads=(), saves=(), waits: bool = False
    ) -> tuple[list[list[int]], list[CopyResult]]:
        """New tokens by row, and the results of the copies."""
        self._sequence += 1
        self.group.submit(StepPlan(self._sequence, [], list(rows_in), rows, list(loads), list(saves), waits))
        finished: list[StepResult | CopyResult] = []
        deadline_s = time.monotonic() + 60
        while len(finished) < 1 + len(loads) + len(saves):
            assert time.monotonic() < deadline_s
            finished += self.group.poll(1)
        (result,) = [one for one in finished if isinstance(one, StepResult)]
        if waits:
            assert finished[-1] is result, "the loads that a step has waited for are told first"
        return [row.token_ids for row in result.rows], sorted(one for one in finished if isinstance(one, CopyResult))

    def decode(self, num_computed_tokens: int, num_new_tokens: int, row_id: int = 1, loads=()) -> list[int]:
        """Prefills the rest of PROMPT and decodes; positions before `num_computed_tokens` are in pages 1, 2, ... already, or come there
        with `loads`, which leave with the step."""
        pages = list(range(1, 2 + (len(PROMPT) + num_new_tokens) // BLOCK_SIZE))
        row = NewRow(row_id, array("I", PROMPT).tobytes(), len(PROMPT), num_computed_tokens, pages, SamplingSettings(temperature=0.0))
        rest = [StepRow(row_id, len(PROMPT) - num_computed_tokens, 0, 0, [])]
        tokens = self.step(rest, (row,), loads=loads, waits=bool(loads))[0][0]
        while len(tokens) < num_new_tokens:
            tokens += self.step([StepRow(row_id, 1, 0, 0, [])])[0][0]
        return tokens

    def close(self) -> None:
        self.group.close()
        self._listener.close()

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def arena() -> Iterator[ArenaSpec]:
    path = Path(f"/dev/shm/mobula-test-worker-{os.getpid()}")
    slot_bytes, num_slots = 4096, 4
    path.write_bytes(bytes(DATA_OFFSET + num_slots * slot_bytes))
    np.memmap(path, np.uint64, "r+", shape=(DATA_OFFSET // 8,))[:] = 5
    yield ArenaSpec(str(path), DATA_OFFSET + num_slots * slot_bytes, DATA_OFFSET, slot_bytes)
    path.unlink()


def copies(slot_bytes: int, checksums: list[bytes]) -> list[BlockCopy]:
    """Blocks 0, 1, ... in pages 1, 2, ... and slots 0, 1, ..."""
    deadline_s = time.monotonic() + 60
    return [BlockCopy(index, index + 1, index * slot_bytes, 5, deadline_s, column) for index, column in enumerate(checksums)]


def test_tokens_are_the_same_at_every_size_cold_and_from_the_arena(pool: RankPool, model: str, arena: ArenaSpec) -> None:
    with Driver(pool, config(model, 1)) as single:
        info = single.group.info
        assert (info.block_size, info.vocab_size, info.max_model_len) == (BLOCK_SIZE, 96, 64)
        assert info.layout.num_parts == 2
        assert info.compute_dtype == "float32"
        assert info.weights_digest is not None
        expected = single.decode(0, 10)
    assert len(set(expected)) > 2

    with Driver(pool, config(model, 2)) as pair:
        assert pair.group.info._replace(pids=[], num_pages=0) == info._replace(pids=[], num_pages=0)
        assert pair.group.info.num_pages == 2 * info.num_pages, "a rank of two holds half of each block"
        assert {rank for rank, _ in pair.phases} == {0, 1}
        assert pair.decode(0, 10) == expected
        pair.group.attach_arena(arena)
        saved = pair.step([], saves=copies(arena.slot_bytes, [b""] * 3))[1]
        assert all(result.ok and len(result.checksums) == 8 * info.layout.num_parts for result in saved)
        assert len({result.checksums for result in saved}) == 3
    checksums = [result.checksums for result in saved]

    for tp in (1, 2):
        with Driver(pool, config(model, tp)) as warm:
            warm.group.attach_arena(arena)
            assert warm.step([], loads=copies(arena.slot_bytes, checksums))[1] == [CopyResult(index, True, b"") for index in range(3)]
            assert warm.decode(3 * BLOCK_SIZE, 10) == expected
            assert warm.decode(3 * BLOCK_SIZE, 10, row_id=2, loads=copies(arena.slot_bytes, checksums)) == expected
            bad = [bytes([column[0] ^ 1]) + column[1:] for column in checksums]
            results = warm.step([], loads=copies(arena.slot_bytes, bad))[1]
            assert results == [CopyResult(index, False, b"", "checksum") for index in range(3)]


class Said:
    """A connection to an engine that notes what it is told."""

    num_unsent_frames = 0

    def __init__(self, said: list[object]) -> None:
        self._said = said

    def fileno(self) -> int:
        return 0

    def send(self, frame: bytes) -> None:
        self._said.append(decode(frame[LENGTH.size :]))


def test_a_step_that_waits_at_gates_is_answered_behind_its_loads() -> None:
    """It is launched while they are under way; that one has failed must be known before what the step made of it. They are begun when what
    the step needs is on its way to the device."""
    said: list[object] = []
    ended = threading.Event()
    load = BlockCopy(7, 1, 0, 1, 60.0, b"")

    class Copier:
        def submit(self, loads: list[BlockCopy], saves: list[BlockCopy]) -> int:
            said.extend(loads)
            return 1

        def gate_loads(self, timeout_s: float) -> bool:
            said.append("gated")
            return True

        def await_loads(self, num_batches: int, timeout_s: float) -> None:
            assert ended.wait(20)

        def results(self) -> list[CopyResult]:
            return [CopyResult(7, False, b"", "checksum")] if ended.is_set() and CopiesDone not in map(type, said) else []

    class Runner:
        def launch(self, plan: StepPlan, before_forward: Callable[[bool], None]) -> StepPlan:
            said.append("ready")
            before_forward(True)
            said.append("launched")
            return plan

        def collect(self, plan: StepPlan) -> list[RowResult]:
            return [RowResult(1, [5])]

    rank = Rank(Said(said), 0, MODEL)  # type: ignore[arg-type]
    rank._runner, rank._copier, answers = Runner(), Copier(), AnswerThread()  # type: ignore[assignment]
    rank._answers = answers
    rank._take(StepPlan(1, [], [], [StepRow(1, 1, 0, 0, [])], [load], [], True))
    assert said == ["ready", load, "gated", "launched"]
    ended.set()
    answers.close()
    answers.check()
    assert [type(message) for message in said[4:]] == [CopiesDone, StepResult]


def test_nothing_is_said_between_taking_results_and_sending_them() -> None:
    """The thread that answers steps may find that the other one has taken the news of a failed load: that goes first."""
    said: list[object] = []
    taken = threading.Event()

    class Copier:
        def results(self) -> list[CopyResult]:
            taken.set()
            answering.join(0.2)
            return [CopyResult(7, False, b"", "checksum")]

    rank = Rank(Said(said), 0, MODEL)  # type: ignore[arg-type]
    rank._copier = Copier()  # type: ignore[assignment]
    answering = threading.Thread(target=lambda: taken.wait(20) and rank._say(StepResult(1, [], 0.0)))
    answering.start()
    rank._send_copies()
    answering.join(20)
    assert [type(message) for message in said] == [CopiesDone, StepResult]


def test_a_group_loads_another_model_on_the_same_ranks(pool: RankPool, model: str) -> None:
    with Driver(pool, config(model, 2)) as driver:
        first = driver.decode(0, 6)
        other = driver.group.load(config(model, 2, seed=4), lambda *progress: None)
        driver._sequence = 0
        second = driver.decode(0, 6)
        again = driver.group.load(config(model, 2, seed=3), lambda *progress: None)
        driver._sequence = 0
        assert driver.decode(0, 6) == first
        assert first != second
        assert other.weights_digest != again.weights_digest


def test_a_checkpoint_that_cannot_be_served_is_told_as_such(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnknownArchitecture, match="MambaForCausalLM"):
        Driver(pool, config(str(tmp_path), 2))


def test_a_rank_without_an_engine_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.worker.CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(GroupFailed, match=r"rank 3: no engine answers at unix:.*/none within 0\.2 s"):
        run_rank(f"unix:{tmp_path}/none", 3, SECRET)


def test_a_rank_whose_engine_goes_before_the_welcome_returns() -> None:
    listener = GroupListener(2, secret=SECRET)
    code = f"from workers.worker import run_rank; run_rank({listener.address!r}, 0, {SECRET!r})"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}) as rank:
        with pytest.raises(GroupFailed, match="rank 1 of 2 has not connected"):
            listener.accept(3)
        listener.close()
        assert rank.wait(10) == 0


def test_names_and_devices() -> None:
    assert load_attribute("workers.worker:MODEL") is MODEL
    assert pick_device("cpu", 3) == "cpu"
    import torch

    if not torch.cuda.is_available():
        assert pick_device("auto", 3) == "cpu"
        with pytest.raises(ValueError, match="sees no CUDA device"):
            pick_device("cuda", 0)


def test_a_rank_can_import_ahead() -> None:
    code = (
        "import sys; from workers.worker import preload; preload().join(60); sys.exit(not {'torch', 'workers.runner'} <= set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=90, check=False).returncode == 0
    )


def test_a_rank_needs_no_torch_until_it_loads_a_model() -> None:
    code = "import sys, workers.worker, workers.group, workers.local, workers.echo, workers.kv.transfer; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False).returncode == 0
    )
