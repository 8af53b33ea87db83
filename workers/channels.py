"""The engine's sockets to its ranks: one wait over all of them, sends that never block, and a wake-up from other threads."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterable

from workers.connection import Disconnected
from workers.listener import Member
from workers.wire import Message, RankError

_LAST_WORDS_S = 0.05  # what else is heard in this time after the first sign of trouble may be its cause


class RankGone(Exception):
    """A rank has ended or does not keep to the protocol. `what` continues "rank 1 (pid 7) has ..."; `error_name` is set if it told why."""

    def __init__(self, rank: int, what: str, error_name: str = "", message: str = "") -> None:
        super().__init__(what)
        self.rank = rank
        self.what = what
        self.error_name = error_name
        self.message = message


class RankChannels:
    """Owns the members' connections. One thread, except `wake`."""

    def __init__(self, members: list[Member]) -> None:
        self._connections = [member.connection for member in members]
        self._ranks = {connection.fileno(): rank for rank, connection in enumerate(self._connections)}
        self._wake_lock = threading.Lock()  # protects _wake_fd from being written after it was closed and its number reused
        self._wake_fd: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        for fd in self._ranks:
            self._epoll.register(fd, select.EPOLLIN)
        self._blocked: set[int] = set()  # ranks with unsent frames
        self._heard_s = [time.monotonic()] * len(members)

    def silence_s(self) -> float:
        """Seconds since the quietest rank was heard."""
        return time.monotonic() - min(self._heard_s)

    def most_unsent_frames(self) -> tuple[int, int]:
        """The rank that is furthest behind in reading, and how many frames it has not taken."""
        if not self._blocked:
            return 0, 0
        rank = max(self._blocked, key=lambda rank: self._connections[rank].num_unsent_frames)
        return rank, self._connections[rank].num_unsent_frames

    def send(self, frame: bytes, ranks: Iterable[int]) -> None:
        """Sends what the sockets take; the rest leaves during `receive`. RankGone."""
        for rank in ranks:
            connection = self._connections[rank]
            try:
                connection.send(frame)
            except Disconnected as error:
                raise RankGone(rank, f"left: {error}") from error
            if connection.num_unsent_frames and rank not in self._blocked:
                self._blocked.add(rank)
                self._epoll.modify(connection.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def receive(self, timeout_s: float) -> tuple[list[tuple[int, Message]], bool]:
        """(rank, message) pairs, each rank's in order, and whether `wake` was called; waits for the first. RankGone."""
        heard: list[tuple[int, Message]] = []
        woken = False
        for fd, event in self._epoll.poll(max(timeout_s, 0.0)):
            rank = self._ranks.get(fd)
            if rank is None:
                woken = True
                self._clear_wake()
                continue
            if event & select.EPOLLOUT:
                self._send_rest(rank)
            if event & ~select.EPOLLOUT:
                heard += [(rank, message) for message in self._hear(rank)]
        return heard, woken

    def _hear(self, rank: int) -> list[Message]:
        try:
            messages = self._connections[rank].receive()
        except Disconnected as error:
            raise RankGone(rank, f"left without a word: {error}") from error
        except ValueError as error:
            raise RankGone(rank, f"broken the protocol: {error}") from error
        for message in messages:
            if isinstance(message, RankError):
                raise RankGone(rank, f"reported {message.name}: {message.message}", message.name, message.message)
        self._heard_s[rank] = time.monotonic()
        return messages

    def _send_rest(self, rank: int) -> None:
        connection = self._connections[rank]
        try:
            if connection.flush():
                self._blocked.discard(rank)
                self._epoll.modify(connection.fileno(), select.EPOLLIN)
        except Disconnected:
            self._hear(rank)  # what it said before it left, if anything
            raise RankGone(rank, "left") from None

    def last_words(self, first: RankGone) -> list[RankGone]:
        """`first`, and what the other ranks say within a moment: a rank's death and the complaints about it arrive in any order."""
        troubles = {first.rank: first}
        self._silence(first.rank)
        if not first.error_name:
            with contextlib.suppress(Disconnected, ValueError):
                errors = [message for message in self._connections[first.rank].receive() if isinstance(message, RankError)]
                if errors:
                    name, message = errors[0]
                    troubles[first.rank] = RankGone(first.rank, f"reported {name}: {message}", name, message)
        deadline_s = time.monotonic() + _LAST_WORDS_S
        while len(troubles) < len(self._connections) and (left_s := deadline_s - time.monotonic()) > 0:
            try:
                self.receive(left_s)
            except RankGone as gone:
                troubles.setdefault(gone.rank, gone)
                self._silence(gone.rank)
        return list(troubles.values())

    def _silence(self, rank: int) -> None:
        with contextlib.suppress(OSError):
            self._epoll.unregister(self._connections[rank].fileno())

    def wake(self) -> None:
        """Makes `receive` return. From any thread, also after `close`."""
        with self._wake_lock:
            if self._wake_fd is not None:
                os.eventfd_write(self._wake_fd, 1)

    def _clear_wake(self) -> None:
        if self._wake_fd is not None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        with self._wake_lock:
            if self._wake_fd is not None:
                os.close(self._wake_fd)
                self._wake_fd = None
        self._epoll.close()
