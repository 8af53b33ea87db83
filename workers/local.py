"""Ranks as plain child processes of this one: for offline tools, tests and measurements. `runtime` places ranks with Ray instead."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Self

from workers.errors import GroupFailed
from workers.worker import IDLE, MODEL, RankParts

_TAIL_BYTES = 4000


class RankProcess:
    """One child. Its output goes to an unnamed file, so that nobody has to read along. `close` kills and reaps."""

    def __init__(self, arguments: list[str], env: Mapping[str, str], *, name: str, pool: bool = False) -> None:
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workers.worker", *arguments],
            env={"OMP_NUM_THREADS": "1", **os.environ, **env},
            stdin=subprocess.PIPE if pool else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pool else self._log,
            stderr=self._log,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the engine; its ranks end when it does
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def output(self) -> str:
        """The end of what it printed."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), _TAIL_BYTES, max(size - _TAIL_BYTES, 0)).decode(errors="replace").strip()

    def obituary(self) -> str:
        return f"{self.name} (pid {self.pid}) has ended with code {self.returncode}: {self.output() or 'it printed nothing'}"

    def send_line(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line.encode() + b"\n")

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether a pool process asked for work within `timeout_s`. Reads one such line."""
        assert self._process.stdout
        deadline_s = time.monotonic() + timeout_s
        line = b""
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                return False
            byte = self._process.stdout.read(1)
            if not byte:
                return False
            if byte != b"\n":
                line += byte
            elif line == IDLE.encode():
                return True
            else:
                line = b""  # something else printed it
        return False

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within `timeout_s`."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self, timeout_s: float = 0.0) -> None:
        """Gives it `timeout_s` to end by itself. Idempotent."""
        if not self.wait(timeout_s):
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()


class LocalRanks:
    """The processes of one group. `close` gives them a moment to end with their engine's socket, then kills; a GroupFailed that leaves
    the `with` gets the last output of ranks that died as a note."""

    def __init__(self, processes: list[RankProcess]) -> None:
        self.processes = processes

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def check(self) -> None:
        """GroupFailed when a process has ended; for `GroupListener.accept`."""
        for process in self.processes:
            if process.returncode is not None:
                raise GroupFailed(process.obituary())

    def close(self, timeout_s: float = 2.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        for process in self.processes:
            process.close(max(deadline_s - time.monotonic(), 0.0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GroupFailed):
            for process in self.processes:
                if process.wait(0.5) and process.returncode:
                    error.add_note(process.obituary())
        self.close(0.5 if error else 2.0)


def spawn_ranks(
    address: str, world_size: int, secret: str, *, parts: RankParts = MODEL, env: Mapping[str, str] | None = None
) -> LocalRanks:
    """Starts ranks 0 to world_size - 1, which connect to a GroupListener's `address`."""
    flags = ["--runner", parts.runner, "--communicator", parts.communicator]
    environment = {**(env or {}), "MOBULA_SECRET": secret}
    ranks = LocalRanks([])
    for rank in range(world_size):
        ranks.processes.append(RankProcess(["--connect", address, "--rank", str(rank), *flags], environment, name=f"rank {rank}"))
    return ranks


class RankPool:
    """Up to `size` processes that serve one group after the other, since importing torch costs seconds. With-able.

    A process that died, or does not come back from its last group, is replaced.
    """

    def __init__(self, size: int, *, env: Mapping[str, str] | None = None) -> None:
        self._env = env or {}
        self._processes: list[RankProcess | None] = [None] * size

    def serve(self, address: str, world_size: int, secret: str, *, parts: RankParts = MODEL, timeout_s: float = 30.0) -> list[int]:
        """Sends `world_size` of the processes to the group at `address`; returns their pids, by rank.

        GroupFailed when a fresh process is not ready within `timeout_s`.
        """
        if world_size > len(self._processes):
            raise ValueError(f"the pool has {len(self._processes)} ranks, not {world_size}")
        pids = []
        for rank in range(world_size):
            process = self._ready(rank, timeout_s)
            process.send_line(json.dumps({"address": address, "rank": rank, "secret": secret, "parts": parts}))
            pids.append(process.pid)
        return pids

    def _ready(self, index: int, timeout_s: float) -> RankProcess:
        process = self._processes[index]
        if process is not None:
            if process.wait_idle(min(timeout_s, 10.0)):
                return process
            process.close()
        process = self._processes[index] = RankProcess(["--pool"], self._env, name=f"rank process {index}", pool=True)
        if not process.wait_idle(timeout_s):
            process.close()
            self._processes[index] = None
            raise GroupFailed(f"rank process {index} is not ready within {timeout_s:g} s")
        return process

    def check(self) -> None:
        """GroupFailed when a process has ended; for `GroupListener.accept`."""
        for process in self._processes:
            if process is not None and process.returncode is not None:
                raise GroupFailed(process.obituary())

    def close(self) -> None:
        for process in self._processes:
            if process is not None:
                process.close()
        self._processes = [None] * len(self._processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
