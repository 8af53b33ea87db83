"""The engine's end of a tensor-parallel group: a listener that the ranks find, and the handle that sends plans and merges answers.

Everything here belongs to the engine's thread, except `RankGroup.wake`. What bounds each wait:

    accept    its timeout; a connection that says no Hello is dropped after listener.HELLO_TIMEOUT_S
    load      its timeout, renewed by progress of any rank (a rank says nothing while it waits for a slower one)
    step      GroupLimits.step_s + step_token_s * tokens, from when the step before it was done
    copy      GroupLimits.copy_s, from its own deadline or the acknowledgement of its plan, whichever is later
    idle      a Ping every GroupLimits.probe_every_s, answered within probe_s

The first thing that goes wrong ends the group: its sockets close, the ranks exit on end of stream, and every later call raises GroupFailed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, Self, TypeVar, cast

from cache_store.errors import MobulaError
from workers.channels import RankChannels, RankGone
from workers.config import WorkerConfig
from workers.errors import BadTensor, CheckpointError, GroupFailed, NotEnoughMemory, UnknownArchitecture, UnsupportedConfig
from workers.listener import Member, RankListener
from workers.loading import Loading, ProgressCallback, group_info, order_of_parts
from workers.pending import CopiesInFlight, OutOfTurn, StepsInFlight
from workers.step import ArenaSpec, CopyResult, GroupInfo, StepPlan, StepResult
from workers.wire import (
    Ack,
    Close,
    CopiesDone,
    Host,
    Hosted,
    Load,
    Loaded,
    Message,
    Ping,
    Pong,
    Unload,
    Unloaded,
    encode,
)

MAX_UNSENT_FRAMES = 64  # to one rank
Answer = TypeVar("Answer", Unloaded, Hosted, Loaded)

# What a rank may report while it loads that is the caller's to mend, and so is raised as itself
_LOAD_ERRORS: dict[str, type[MobulaError]] = {
    error.__name__: error for error in (CheckpointError, UnknownArchitecture, UnsupportedConfig, BadTensor, NotEnoughMemory)
}


@dataclasses.dataclass(frozen=True, slots=True)
class GroupLimits:
    """How long a group may be silent before it is given up, in seconds."""

    step_s: float = 30.0
    step_token_s: float = 0.05  # per query token of the step
    copy_s: float = 30.0
    probe_every_s: float = 5.0
    probe_s: float = 30.0
    send_s: float = 10.0  # for a rank to read something when it is MAX_UNSENT_FRAMES behind
    spin_s: float = 50e-6  # of asking again and again before `poll` sleeps, while a step is in flight and cores are to spare


class GroupListener:
    """Takes in the ranks of one group. Listens from construction; `close` (or the end of `with`) stops that and removes the socket.

    Args:
        directory: where the unix socket's own directory (mode 0700) is made; default: the system's temporary directory.
        host: listen on this TCP address instead, on a free port: for ranks on other nodes.
        secret: what a rank must say to be let in.
    """

    def __init__(
        self, world_size: int, *, secret: str, directory: str | None = None, host: str | None = None, limits: GroupLimits | None = None
    ) -> None:
        self._listener = RankListener(world_size, directory=directory, host=host, secret=secret)
        self._limits = limits or GroupLimits()

    @property
    def address(self) -> str:
        """ "unix:/path" or "tcp:host:port", for the ranks."""
        return self._listener.address

    def accept(self, timeout_s: float, check: Callable[[], None] | None = None) -> RankGroup:
        """Waits until every rank is in; after that the listener is closed, since a group never takes a rank back.

        `check` is called several times a second and may raise to give up early (`LocalRanks.check`: a process has ended).
        GroupFailed names the ranks that are missing after `timeout_s`.
        """
        return RankGroup(self._listener.accept(timeout_s, check), self._limits)

    def close(self) -> None:
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RankGroup:
    """The ranks of one replica (`workers.step.WorkerGroup`). Owns their connections; `close` or the end of `with` ends the ranks."""

    def __init__(self, members: list[Member], limits: GroupLimits) -> None:
        self._members = members
        self._ranks = range(len(members))
        self._limits = limits
        self._channels = RankChannels(members)
        # On a core that a rank of this machine waits for, spinning delays what it spins for: 190 us a step instead of 140 (tp 2, 2 cores).
        self._spin_s = limits.spin_s if len(os.sched_getaffinity(0)) > len(members) + 1 else 0.0
        self._end: GroupFailed | None = None
        self._info: GroupInfo | None = None
        self._forget_work(self._ranks)
        self._loading: Loading | None = None
        self._woken = False
        self._num_pings = 0
        self._owe_pong: set[int] = set()  # ranks
        self._probe_at_s = time.monotonic() + limits.probe_every_s  # the next Ping; while ranks owe a Pong, the end of the wait for it

    def _forget_work(self, part_order: Sequence[int]) -> None:
        self._steps = StepsInFlight(len(self._members), self._limits.step_s, self._limits.step_token_s)
        self._copies = CopiesInFlight(part_order, self._limits.copy_s)
        self._finished: list[StepResult | CopyResult] = []

    @property
    def info(self) -> GroupInfo:
        if self._info is None:
            raise GroupFailed("the group has no model: call load first")
        return self._info

    def answer_age_s(self) -> float:
        """Seconds since the quietest rank said anything. While `poll` is being called, an idle rank is asked every probe_every_s."""
        return self._channels.silence_s()

    def submit(self, plan: StepPlan) -> None:
        """Sends the plan to every rank and returns at once. GroupFailed when a rank is gone or has stopped reading."""
        self._require(loaded=True)
        frame = encode(plan)
        self._steps.add(plan, time.monotonic())
        self._copies.add(plan)
        self._send(frame, self._ranks)

    def poll(self, timeout_s: float) -> list[StepResult | CopyResult]:
        """What the whole group has finished, waiting up to `timeout_s` for the first, or until `wake`. GroupFailed: see the module."""
        self._require()
        now_s = time.monotonic()
        end_s = now_s + timeout_s
        spin_until_s = now_s + self._spin_s if self._steps else now_s
        while True:
            wait_s = 0.0
            if now_s >= spin_until_s and not self._finished:
                wait_s = min(end_s, self._steps.deadline_s, self._probe_at_s) - now_s
            self._listen(wait_s)
            now_s = time.monotonic()
            if not self._finished:
                self._judge_silence(now_s)
            if self._finished or self._woken or now_s >= end_s:
                self._woken = False
                finished, self._finished = self._finished, []
                return finished

    def wake(self) -> None:
        """Makes a `poll` that is waiting return, or the next one. May be called from any thread, also after `close`."""
        self._channels.wake()

    def attach_arena(self, arena: ArenaSpec) -> None:
        """Copies of later plans mean this arena. A rank that cannot map it answers them with reason "arena"."""
        self._require(loaded=True)
        self._send(encode(arena), self._ranks)

    def load(self, config: WorkerConfig, progress: ProgressCallback, timeout_s: float = 600.0) -> GroupInfo:
        """Loads a model on every rank, after freeing the one before, and returns what the ranks agree on.

        Args:
            progress: called in this thread with (rank, phase, done, total).
            timeout_s: limit on the time without progress from any rank.

        Raises a CheckpointError or NotEnoughMemory as a rank reported it, GroupFailed for anything else. Each of them ends the group.
        """
        if config.tensor_parallel_size != len(self._members):
            raise ValueError(f"tensor_parallel_size is {config.tensor_parallel_size}, but the group has {len(self._members)} ranks")
        self._require()
        self._info = None
        self._loading = Loading(progress, timeout_s)
        try:
            self._ask(self._ranks, Unload(), Unloaded)  # answered after everything that was asked before it
            self._forget_work(self._ranks)
            host = self._members[0].host or "127.0.0.1"
            port = self._ask([0], Host(host), Hosted)[0].port if len(self._members) > 1 else 0
            loaded = self._ask(self._ranks, Load(dataclasses.asdict(config), host, port), Loaded)
        finally:
            self._loading = None
        facts = [answer.facts for answer in loaded]
        try:
            part_order = order_of_parts(facts)
        except RankGone as gone:
            self._fail(gone)
        self._forget_work(part_order)
        self._owe_pong.clear()
        self._probe_at_s = time.monotonic() + self._limits.probe_every_s
        self._info = group_info(facts, [(member.pid, member.start_ticks) for member in self._members])
        return self._info

    def close(self) -> None:
        """Ends the group: the ranks return. Idempotent."""
        if self._end is None:
            with contextlib.suppress(RankGone):
                self._channels.send(encode(Close()), self._ranks)
            self._shut(GroupFailed("the group is closed"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Below: what the calls above are made of. Everything that fails goes through _fail.

    def _require(self, *, loaded: bool = False) -> None:
        if self._end is not None:
            raise GroupFailed(str(self._end))
        if loaded:
            assert self.info

    def _send(self, frame: bytes, ranks: Iterable[int]) -> None:
        try:
            self._channels.send(frame, ranks)
        except RankGone as gone:
            self._fail(gone)
        give_up_s = time.monotonic() + self._limits.send_s
        while (behind := self._channels.most_unsent_frames())[1] > MAX_UNSENT_FRAMES:
            self._listen(0.1)  # reads too: a rank that waits for us to read would never read itself
            if time.monotonic() > give_up_s:
                rank, num_frames = behind
                self._fail(RankGone(rank, f"not read {num_frames} frames within {self._limits.send_s:g} s{self._states([rank])}"))

    def _ask(self, ranks: Sequence[int], question: Message, kind: type[Answer]) -> list[Answer]:
        """Sends a question of loading and waits for an answer of `kind` from each of `ranks`."""
        assert self._loading
        loading = self._loading
        loading.ask(kind)
        self._send(encode(question), ranks)
        while missing := [rank for rank in ranks if rank not in loading.answers]:
            left_s = loading.deadline_s - time.monotonic()
            if left_s <= 0:
                phase = loading.phases.get(missing[0], type(question).__name__)
                what = f"made no progress for {loading.timeout_s:g} s while loading ({phase}){self._states(missing)}"
                self._fail(RankGone(missing[0], what))
            self._listen(left_s)
        return [cast(Answer, loading.answers[rank]) for rank in ranks]

    def _listen(self, wait_s: float) -> None:
        """Waits once, and takes in what the ranks said."""
        try:
            heard, woken = self._channels.receive(wait_s)
        except RankGone as gone:
            self._fail(gone)
        self._woken = self._woken or woken
        for rank, message in heard:
            try:
                self._take(rank, message)
            except OutOfTurn as error:
                self._fail(RankGone(rank, str(error)))

    def _take(self, rank: int, message: Message) -> None:
        if isinstance(message, StepResult):
            self._finish_step(rank, message.sequence, message)
        elif isinstance(message, Ack):
            self._finish_step(rank, message.sequence, None)
        elif isinstance(message, CopiesDone):
            results = [self._copies.answer(rank, result) for result in message.results]
            self._finished += [result for result in results if result is not None]
        elif isinstance(message, Pong) and rank in self._owe_pong:
            self._owe_pong.remove(rank)
            if not self._owe_pong:
                self._probe_at_s = time.monotonic() + self._limits.probe_every_s
        elif self._loading is None or not self._loading.take(rank, message):
            raise OutOfTurn(f"said {type(message).__name__} without being asked")

    def _finish_step(self, rank: int, sequence: int, result: StepResult | None) -> None:
        now_s = time.monotonic()
        finished = self._steps.answer(rank, sequence, result, now_s)
        if finished is not None:
            self._copies.start_clock(sequence, now_s)
            self._finished.append(finished)

    def _judge_silence(self, now_s: float) -> None:
        """Ends the group when something is overdue; asks ranks that have nothing to do whether they are there."""
        if now_s > self._steps.deadline_s:
            self._give_up(*self._steps.overdue())
        if now_s < self._probe_at_s:
            return
        if overdue := self._copies.overdue(now_s):
            self._give_up(*overdue)
        if self._owe_pong:
            self._give_up(self._owe_pong, f"not answered a probe within {self._limits.probe_s:g} s")
        self._probe_at_s = now_s + self._limits.probe_every_s
        if not self._steps:  # a busy rank answers only after its step, which has its own deadline
            self._num_pings += 1
            self._owe_pong = set(self._ranks)
            self._probe_at_s = now_s + self._limits.probe_s
            self._send(encode(Ping(self._num_pings)), self._ranks)

    def _give_up(self, ranks: Iterable[int], what: str) -> NoReturn:
        late = sorted(ranks)
        self._fail(RankGone(late[0], what + self._states(late)))

    def _states(self, ranks: Sequence[int]) -> str:
        """What the kernel says about ranks that are late: a stopped one explains all the others."""
        states = [f"{self._members[rank].name}: {self._members[rank].state()}" for rank in ranks]
        return f" [{', '.join(states)}]"

    def _fail(self, first: RankGone) -> NoReturn:
        """Ends the group and raises what explains it best: an error that is ours, else a rank that is gone, else an error of torch's."""
        troubles = self._channels.last_words(first)
        troubles.sort(key=lambda trouble: 0 if trouble.error_name in _LOAD_ERRORS else 2 if trouble.error_name else 1)
        told = "; ".join(f"{self._members[trouble.rank].name} has {trouble.what}" for trouble in troubles)
        self._shut(GroupFailed(f"the group has ended: {told}"))
        if self._loading and troubles[0].error_name in _LOAD_ERRORS:
            raise _LOAD_ERRORS[troubles[0].error_name](troubles[0].message)
        raise GroupFailed(str(self._end)) from first

    def _shut(self, end: GroupFailed) -> None:
        self._end = end
        self._channels.close()
