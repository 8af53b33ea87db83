"""Measurements in child processes, one after the other: whatever becomes of one, the card is free for the next."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

TICK_S = 1.0
END_GRACE_S = 20.0  # for a child that has all its figures, and for one that is told to end
GROUP_GRACE_S = 3.0  # for what a child that has ended leaves behind
MEMORY_TIMEOUT_S = 60.0
MEMORY_SLACK_MIB = 1024


class Budget:
    """Seconds that everything together may take, from now on."""

    def __init__(self, total_s: float) -> None:
        self._deadline_s = time.monotonic() + total_s

    @property
    def left_s(self) -> float:
        return self._deadline_s - time.monotonic()


def run_child(
    module: str,
    arguments: Sequence[str],
    *,
    limit_s: float,
    env: Mapping[str, str] | None = None,
    on_tick: Callable[[], bool] = lambda: False,
) -> str:
    """Runs `python -m module` with its output on our stderr. Empty, or why it failed. `on_tick` is called about every second and after
    the end; it returns whether the child has delivered, and need not be waited for much longer."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=sys.stderr,
        env={**os.environ, **(env or {})},
        start_new_session=True,  # a group of its own, which is ended as a whole
    )
    deadline_s = time.monotonic() + limit_s
    is_delivered = False
    try:
        while process.poll() is None:
            if time.monotonic() > deadline_s:
                return "" if is_delivered else f"{module} was ended after {limit_s:.0f} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK_S)
            if on_tick() and not is_delivered:
                is_delivered = True
                deadline_s = time.monotonic() + END_GRACE_S
    finally:
        _end_group(process)
    return "" if on_tick() or not process.returncode else f"{module} ended with code {process.returncode}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Also what the child has left behind; its dead may stay in the group for long where nobody reaps them."""
    _signal_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_GRACE_S)
    deadline_s = time.monotonic() + GROUP_GRACE_S
    while _signal_group(process, 0) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Whether there is still somebody in the group. 0 only asks."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def used_memory_mib() -> int | None:
    """Of the first card, by nvidia-smi; None where that does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20.0, check=True).stdout.split("\n")
        return int(lines[0])
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def await_free_memory(base_mib: int | None) -> None:
    """Until no more of the card is used than `base_mib` and a little; says so when that does not come."""
    if base_mib is None:
        return
    deadline_s = time.monotonic() + MEMORY_TIMEOUT_S
    while (used_mib := used_memory_mib()) is not None and used_mib > base_mib + MEMORY_SLACK_MIB:
        if time.monotonic() > deadline_s:
            print(f"  {used_mib} MiB of the card are still used after {MEMORY_TIMEOUT_S:.0f} s", file=sys.stderr, flush=True)
            return
        time.sleep(0.5)
