"""The engine's handle on real rank processes, without a model."""

import os
import random
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.config import WorkerConfig
from workers.connection import Connection, Disconnected, connect
from workers.errors import GroupFailed, UnknownArchitecture
from workers.group import GroupLimits, GroupListener, RankGroup
from workers.local import LocalRanks, RankPool, spawn_ranks
from workers.step import BlockCopy, CopyResult, NewRow, RowResult, SamplingSettings, StepPlan, StepResult, StepRow
from workers.wire import LENGTH, Hello, Refused, encode
from workers.worker import ECHO, RankParts

HERE = Path(__file__).parent
ENV = {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
SECRET = "s3cret"
START_S = 60.0
BAD_ROW = 13


def faulty(runner: str) -> RankParts:
    return RankParts(f"rank_runners:{runner}", ECHO.communicator)


def config(world_size: int, **changes: object) -> WorkerConfig:
    return WorkerConfig(model="none", tensor_parallel_size=world_size, device="cpu", **changes)


def no_progress(rank: int, phase: str, done: int, total: int) -> None:
    pass


def plan_of(sequence: int, row_ids: list[int], num_query_tokens: int = 1) -> StepPlan:
    return StepPlan(sequence, [], [], [StepRow(row_id, num_query_tokens, 0, 0, []) for row_id in row_ids], [], [])


def submit_all(group: RankGroup, plans: list[StepPlan]) -> None:
    for plan in plans:
        group.submit(plan)


def poll_until(group: RankGroup, num_results: int, timeout_s: float = 10.0) -> list[StepResult | CopyResult]:
    results: list[StepResult | CopyResult] = []
    deadline_s = time.monotonic() + timeout_s
    while len(results) < num_results:
        assert time.monotonic() < deadline_s, f"{len(results)} of {num_results} results within {timeout_s} s"
        results += group.poll(0.5)
    return results


def wait_until_gone(pids: list[int], timeout_s: float) -> float:
    """Seconds until no process has one of `pids`; a zombie counts as gone."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < timeout_s:
        if not any(is_alive(pid) for pid in pids):
            return time.monotonic() - started_s
        select.select([], [], [], 0.01)
    raise AssertionError(f"processes {[pid for pid in pids if is_alive(pid)]} are still there after {timeout_s} s")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Started:
    """A group over fresh processes, to be broken."""

    def __init__(self, world_size: int, parts: RankParts, limits: GroupLimits | None = None) -> None:
        self.listener = GroupListener(world_size, secret=SECRET, limits=limits)
        self.ranks: LocalRanks = spawn_ranks(self.listener.address, world_size, SECRET, parts=parts, env=ENV)
        self.group = self.listener.accept(START_S, check=self.ranks.check)

    def close(self) -> None:
        self.group.close()
        self.ranks.close()
        self.listener.close()


@pytest.fixture
def start() -> Iterator[type[Started]]:
    started: list[Started] = []

    def make(world_size: int, parts: RankParts = ECHO, limits: GroupLimits | None = None) -> Started:
        started.append(Started(world_size, parts, limits))
        return started[-1]

    yield make  # type: ignore[misc]
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4, env=ENV) as pool:
        yield pool


@pytest.fixture(params=[1, 2, 4])
def group(request: pytest.FixtureRequest, pool: RankPool) -> Iterator[RankGroup]:
    with GroupListener(request.param, secret=SECRET) as listener:
        pids = pool.serve(listener.address, request.param, SECRET, parts=ECHO)
        with listener.accept(START_S, check=pool.check) as group:
            info = group.load(config(request.param), no_progress, timeout_s=START_S)
            assert [pid for pid, _ in info.pids] == pids
            yield group


# A healthy group


def test_results_come_in_the_order_of_plans(group: RankGroup) -> None:
    draw = random.Random(3)
    for sequence in range(1, 60):
        row_ids = [draw.randrange(1000) for _ in range(draw.randrange(40))]
        group.submit(plan_of(sequence, row_ids))
        (result,) = poll_until(group, 1)
        assert isinstance(result, StepResult)
        assert result.sequence == sequence
        assert result.rows == [RowResult(row_id, [row_id]) for row_id in row_ids]
        assert result.forward_s >= 0


def test_the_next_plan_may_leave_before_the_result(group: RankGroup) -> None:
    group.submit(plan_of(1, [1]))
    finished = []
    for sequence in range(2, 50):
        group.submit(plan_of(sequence, [sequence]))
        finished += poll_until(group, 1)
    finished += poll_until(group, 49 - len(finished))
    assert [result.sequence for result in finished] == list(range(1, 50))
    assert [result.rows[0].row_id for result in finished] == list(range(1, 50))


def test_many_plans_ahead_and_big_frames(group: RankGroup) -> None:
    row = NewRow(1, bytes(range(256)) * 40_000, 1, 0, list(range(1, 3000)), SamplingSettings())  # 10 MB of tokens
    for sequence in range(1, 9):
        group.submit(plan_of(sequence, [sequence])._replace(rows_in=[row, row]))
    assert [result.sequence for result in poll_until(group, 8, 30)] == list(range(1, 9))


def test_poll_returns_after_its_timeout_and_on_wake(group: RankGroup) -> None:
    started_s = time.monotonic()
    assert group.poll(0.05) == []
    assert 0.04 < time.monotonic() - started_s < 5
    waker = threading.Timer(0.05, group.wake)
    waker.start()
    started_s = time.monotonic()
    assert group.poll(30) == []
    assert time.monotonic() - started_s < 10
    waker.join()
    group.wake()
    assert group.poll(30) == []  # a wake before the poll counts
    assert group.poll(0) == []


def test_copies_without_an_arena_fail_as_arena(group: RankGroup) -> None:
    soon_s = time.monotonic() + 60
    load, save = BlockCopy(5, 1, 0, 1, soon_s, b""), BlockCopy(6, 2, 0, 1, soon_s, b"")
    group.submit(plan_of(1, [1])._replace(loads=[load], saves=[save]))
    results = poll_until(group, 3)
    assert isinstance(results[-1], CopyResult | StepResult)
    copies = sorted(result for result in results if isinstance(result, CopyResult))
    assert copies == [CopyResult(5, False, b"", "arena"), CopyResult(6, False, b"", "arena")]


def test_a_group_loads_again(group: RankGroup) -> None:
    world_size = len(group.info.pids)
    group.submit(plan_of(1, [1]))  # its result is dropped with the model
    seen: list[tuple[int, str, int, int]] = []
    wanted = config(world_size, block_size=32, max_num_seqs=7, max_num_batched_tokens=300)
    info = group.load(wanted, lambda *progress: seen.append(progress), timeout_s=START_S)
    assert (info.block_size, info.max_num_seqs, info.max_num_batched_tokens) == (32, 7, 300)
    assert info.layout.num_parts == world_size
    assert sorted(seen) == [(rank, "echo", 1, 1) for rank in range(world_size)]
    group.submit(plan_of(1, [8]))  # sequences start anew
    assert [result.sequence for result in poll_until(group, 1)] == [1]


def test_an_idle_rank_is_probed(start: type[Started]) -> None:
    group = start(2, limits=GroupLimits(probe_every_s=0.05, probe_s=10)).group
    group.load(config(2), no_progress)
    deadline_s = time.monotonic() + 10
    group.poll(0.3)
    while group.answer_age_s() > 0.2 and time.monotonic() < deadline_s:
        group.poll(0.05)
    assert group.answer_age_s() <= 0.2
    group.submit(plan_of(1, [1]))
    assert len(poll_until(group, 1)) == 1


def test_tcp(pool: RankPool) -> None:
    with GroupListener(2, secret=SECRET, host="127.0.0.1") as listener:
        assert listener.address.startswith("tcp:127.0.0.1:")
        pool.serve(listener.address, 2, SECRET, parts=ECHO)
        with listener.accept(START_S, check=pool.check) as group:
            group.load(config(2), no_progress)
            group.submit(plan_of(1, [1, 2, 3]))
            assert len(poll_until(group, 1)[0].rows) == 3


def test_big_results(start: type[Started]) -> None:
    group = start(2, faulty("BigResults")).group
    group.load(config(2), no_progress)
    for sequence in (1, 2, 3):
        group.submit(plan_of(sequence, [1, 2], num_query_tokens=4_000_000))
    for result in poll_until(group, 3, 60):
        assert [len(row.logprobs) for row in result.rows] == [4_000_000] * 2


# The socket


def test_the_socket_is_private_and_goes_with_the_listener(tmp_path: Path) -> None:
    with GroupListener(1, secret=SECRET, directory=str(tmp_path)) as listener:
        path = Path(listener.address.removeprefix("unix:"))
        assert path.is_relative_to(tmp_path)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with pytest.raises(GroupFailed, match=r"rank 0 of 1 has not connected .* within 0\.05 s"):
            listener.accept(0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_socket_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    directory.mkdir()
    with pytest.raises(ValueError, match="shorter directory"):
        GroupListener(1, secret=SECRET, directory=str(directory))
    assert list(directory.iterdir()) == []


def say(address: str, *frames: bytes) -> Connection:
    connection = Connection(connect(address, 5))
    for frame in frames:
        connection.send(frame)
    return connection


def answer_of(connection: Connection) -> object:
    """What the engine says, or None when it hangs up."""
    select.select([connection], [], [], 10)
    try:
        messages = connection.receive()
        return messages[0] if messages else None
    except Disconnected:
        return None


def test_strangers_are_refused_and_do_not_stand_in_the_way(pool: RankPool) -> None:
    with GroupListener(2, secret=SECRET) as listener:
        strangers = {
            "secret": say(listener.address, encode(Hello(0, 1, 1, "guess"))),
            "ranks 0 to 1": say(listener.address, encode(Hello(2, 1, 1, SECRET))),
            "not a Hello": say(listener.address, LENGTH.pack(3) + b"\x93\x01\x02"),
            "over the limit": say(listener.address, LENGTH.pack(1 << 29)),
        }
        silent = say(listener.address)
        twin = say(listener.address, encode(Hello(0, 1, 1, SECRET)))
        with pytest.raises(GroupFailed, match=r"rank 1 of 2 has not connected .* refused: .*secret"):
            listener.accept(1.0)
        for reason, connection in strangers.items():
            answer = answer_of(connection)
            assert isinstance(answer, Refused), reason
            assert reason in answer.reason or "not a frame" in answer.reason
        pool.serve(listener.address, 2, SECRET, parts=ECHO)
        with listener.accept(START_S, check=pool.check) as group:
            assert group.load(config(2), no_progress).vocab_size > 0
        for connection in (*strangers.values(), silent, twin):
            connection.close()


def test_a_rank_that_is_refused_says_so_and_ends() -> None:
    with GroupListener(1, secret=SECRET) as listener, spawn_ranks(listener.address, 1, "wrong", parts=ECHO, env=ENV) as ranks:
        with pytest.raises(GroupFailed, match=r"rank 0 \(pid \d+\) has ended with code 1: (.|\n)*the secret is not this group's"):
            listener.accept(START_S, check=ranks.check)


# Groups that break


def test_a_gap_in_the_sequence_ends_the_group(start: type[Started]) -> None:
    started = start(2)
    started.group.load(config(2), no_progress)
    started.group.submit(plan_of(1, [1]))
    started.group.submit(plan_of(3, [1]))
    with pytest.raises(GroupFailed, match=r"rank \d \(pid \d+\) has reported ValueError: plan 3 came where 2 is next"):
        poll_until(started.group, 2)
    for call in (lambda: started.group.poll(0), lambda: started.group.submit(plan_of(2, [1]))):
        with pytest.raises(GroupFailed, match="plan 3 came where 2 is next"):
            call()
    started.group.wake()
    started.group.close()
    started.group.close()
    wait_until_gone(started.ranks.pids, 5)


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_rank_is_named_at_once(start: type[Started], busy: bool) -> None:
    started = start(4)
    started.group.load(config(4), no_progress)
    victim = started.ranks.pids[2]
    if busy:
        started.group.submit(plan_of(1, [1]))
        poll_until(started.group, 1)
    os.kill(victim, signal.SIGKILL)
    killed_s = time.monotonic()
    with pytest.raises(GroupFailed, match=rf"rank 2 \(pid {victim}\) has left"):
        started.group.poll(10)
    assert time.monotonic() - killed_s < 1.0
    wait_until_gone(started.ranks.pids, 5)  # the others went with it


def test_the_rank_that_died_is_named_before_those_that_complain(start: type[Started]) -> None:
    started = start(2, faulty("DiesInStep"))
    started.group.load(config(2), no_progress)
    started.group.submit(plan_of(1, [BAD_ROW]))
    with pytest.raises(GroupFailed, match=rf"ended: rank 1 \(pid {started.ranks.pids[1]}\) has left") as caught:
        poll_until(started.group, 1)
    assert "rank 0" not in str(caught.value) or "Connection closed by peer" in str(caught.value)


def test_a_stopped_rank_is_given_up_at_the_steps_deadline(start: type[Started]) -> None:
    started = start(2, limits=GroupLimits(step_s=0.3, step_token_s=0.001))
    started.group.load(config(2), no_progress)
    started.group.submit(plan_of(1, [1]))
    poll_until(started.group, 1)
    victim = started.ranks.pids[1]
    os.kill(victim, signal.SIGSTOP)
    try:
        stopped_s = time.monotonic()
        started.group.submit(plan_of(2, [1, 2], num_query_tokens=50))
        expected = rf"rank 1 \(pid {victim}\) has not finished step 2 \(100 tokens\) within 0\.4 s \[rank 1 \(pid {victim}\): stopped\]"
        with pytest.raises(GroupFailed, match=expected):
            started.group.poll(30)
        assert 0.35 < time.monotonic() - stopped_s < 3.0
    finally:
        os.kill(victim, signal.SIGCONT)
    wait_until_gone(started.ranks.pids, 5)


def test_a_stopped_rank_is_found_by_the_probe_of_an_idle_group(start: type[Started]) -> None:
    started = start(2, limits=GroupLimits(probe_every_s=0.05, probe_s=0.2))
    started.group.load(config(2), no_progress)
    os.kill(started.ranks.pids[0], signal.SIGSTOP)
    try:
        with pytest.raises(GroupFailed, match=r"rank 0 .* not answered a probe within 0\.2 s"):
            started.group.poll(30)
    finally:
        os.kill(started.ranks.pids[0], signal.SIGCONT)


def test_a_rank_that_stopped_reading_does_not_block_the_engine(start: type[Started]) -> None:
    started = start(1, limits=GroupLimits(step_s=60, send_s=0.3))
    started.group.load(config(1), no_progress)
    os.kill(started.ranks.pids[0], signal.SIGSTOP)
    row = NewRow(1, bytes(100_000), 1, 0, [1], SamplingSettings())
    try:
        began_s = time.monotonic()
        with pytest.raises(GroupFailed, match=r"rank 0 .* has not read \d+ frames within 0\.3 s"):
            submit_all(started.group, [plan_of(sequence, [1])._replace(rows_in=[row]) for sequence in range(1, 200)])
        assert time.monotonic() - began_s < 5
    finally:
        os.kill(started.ranks.pids[0], signal.SIGCONT)


def test_an_error_in_a_step_is_told(start: type[Started]) -> None:
    started = start(2, faulty("FailsInStep"))
    started.group.load(config(2), no_progress)
    started.group.submit(plan_of(1, [1, BAD_ROW]))
    with pytest.raises(GroupFailed) as caught, started.ranks:
        poll_until(started.group, 1)
    assert f"rank 1 (pid {started.ranks.pids[1]}) has reported RuntimeError: row 13 is unlucky" in str(caught.value)
    assert any("Traceback" in note and "row 13 is unlucky" in note for note in caught.value.__notes__)


def test_an_error_of_the_checkpoint_keeps_its_class(start: type[Started]) -> None:
    started = start(2, faulty("FailsToLoad"))
    with pytest.raises(UnknownArchitecture, match=r"^config\.json: MambaForCausalLM is not in the table of models$"):
        started.group.load(config(2), no_progress)
    with pytest.raises(GroupFailed, match="rank 1 .* UnknownArchitecture"):
        started.group.poll(0)


def test_a_load_without_progress_is_given_up(start: type[Started]) -> None:
    started = start(2, faulty("LoadsForEver"))
    with pytest.raises(GroupFailed, match=r"rank 1 .* no progress for 0\.5 s while loading \(weights 3/12\)"):
        started.group.load(config(2), no_progress, timeout_s=0.5)


def test_ranks_must_agree(start: type[Started]) -> None:
    group = start(2, faulty("LoadsSomethingElse")).group
    assert group.load(config(2), no_progress).num_pages == 64  # the least of 64 and 65
    with pytest.raises(GroupFailed, match="rank 1 .* loaded something else than rank 0: vocab_size is 65537, not 65536"):
        group.load(config(2, seed=1), no_progress)
    with pytest.raises(GroupFailed, match="vocab_size"):
        group.load(config(2), no_progress)


def test_what_cannot_be_asked(start: type[Started]) -> None:
    group = start(1).group
    with pytest.raises(GroupFailed, match="call load first"):
        group.submit(plan_of(1, []))
    with pytest.raises(ValueError, match="tensor_parallel_size is 2, but the group has 1 ranks"):
        group.load(config(2), no_progress)


# Ends


ENGINE = """
import sys, threading
from workers.config import WorkerConfig
from workers.group import GroupListener
from workers.local import spawn_ranks
from workers.worker import ECHO
listener = GroupListener(2, secret="x")
ranks = spawn_ranks(listener.address, 2, "x", parts=ECHO)
group = listener.accept(60, check=ranks.check)
group.load(WorkerConfig(model="none", tensor_parallel_size=2, device="cpu"), lambda *progress: None)
print(*ranks.pids, listener.address, flush=True)
threading.Event().wait()
"""


def test_ranks_end_when_their_engine_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ENGINE], env={**os.environ, **ENV}, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout
        *pids, address = engine.stdout.readline().split()
        engine.kill()
        assert wait_until_gone([int(pid) for pid in pids], 5) < 1.0
        assert not Path(address.removeprefix("unix:")).parent.exists()


def test_a_rank_inside_a_load_ends_soon_after_its_engine() -> None:
    code = (
        "from workers.worker import RankParts, run_rank\n"
        f"run_rank({{address!r}}, 0, {SECRET!r}, parts=RankParts('rank_runners:FailsToLoad', {ECHO.communicator!r}), exit_grace_s=0.2)"
    )
    with GroupListener(1, secret=SECRET) as listener:
        command = [sys.executable, "-c", code.format(address=listener.address)]
        with subprocess.Popen(command, env={**os.environ, **ENV}, stderr=subprocess.PIPE, text=True) as rank:
            with listener.accept(START_S) as group, pytest.raises(GroupFailed, match="no progress"):
                group.load(config(1), no_progress, timeout_s=0.3)
            assert rank.wait(10) == 1
            assert rank.stderr
            assert "ending the process" in rank.stderr.read()


def test_a_pool_replaces_a_rank_that_died(pool: RankPool) -> None:
    all_pids = []
    for _ in range(2):
        with GroupListener(2, secret=SECRET) as listener:
            pids = pool.serve(listener.address, 2, SECRET, parts=ECHO)
            with listener.accept(START_S, check=pool.check) as group:
                group.load(config(2), no_progress)
                os.kill(pids[1], signal.SIGKILL)
                with pytest.raises(GroupFailed, match="rank 1"):
                    group.poll(10)
        all_pids.append(pids)
    assert all_pids[0][0] == all_pids[1][0]
    assert all_pids[0][1] != all_pids[1][1]


def test_accept_gives_up_when_a_process_has_ended() -> None:
    with GroupListener(2, secret=SECRET) as listener:
        with spawn_ranks(listener.address, 2, SECRET, parts=ECHO, env=ENV) as ranks:
            os.kill(ranks.pids[1], signal.SIGKILL)
            began_s = time.monotonic()
            with pytest.raises(GroupFailed, match=rf"rank 1 \(pid {ranks.pids[1]}\) has ended with code -9"):
                listener.accept(60, check=ranks.check)
            assert time.monotonic() - began_s < 5


def test_a_closed_listener_takes_nobody() -> None:
    listener = GroupListener(1, secret=SECRET)
    listener.close()
    listener.close()
    with pytest.raises(GroupFailed, match="closed"):
        listener.accept(1)
    with pytest.raises(OSError, match="refused|No such file"), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(listener.address.removeprefix("unix:"))
