"""Where the ranks of one group come in: a unix socket in a directory of its own, or a TCP port. Each first says who it is."""

from __future__ import annotations

import contextlib
import hmac
import os
import selectors
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workers.connection import Connection, Disconnected, tune
from workers.errors import GroupFailed
from workers.wire import MAX_FRAME_BYTES, MAX_HELLO_BYTES, Hello, Refused, Welcome, encode

HELLO_TIMEOUT_S = 10.0
_MAX_UNIX_PATH_BYTES = 107
_PROCESS_STATES = {"S": "waiting", "D": "in the kernel", "T": "stopped", "t": "traced", "Z": "dead", "X": "dead"}
_NUM_STRANGERS = 16  # connections that have not said Hello, beyond one for every rank


@dataclass(frozen=True, slots=True)
class Member:
    """A rank that has been let in."""

    rank: int
    pid: int
    start_ticks: int
    connection: Connection
    host: str | None  # TCP: the address it came from; None: this machine

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid})"

    def state(self) -> str:
        """What the kernel says of the process, when it is one of this machine."""
        if self.host is not None:
            return "on another node"
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return "gone"
        return _PROCESS_STATES.get(stat.rpartition(")")[2].split()[0], "running")


class RankListener:
    """Listens from construction until `close`, which removes the socket's directory.

    Args:
        directory: where the unix socket's directory (mode 0700) is made; default: the temporary directory.
        host: listen on this TCP address instead, on a free port.
    """

    def __init__(self, world_size: int, *, directory: str | None, host: str | None, secret: str) -> None:
        if world_size < 1:
            raise ValueError(f"a group needs at least one rank, not {world_size}")
        self._world_size = world_size
        self._secret = secret.encode()
        self._directory: str | None = None
        self._socket: socket.socket | None = None
        if host is not None:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, 0), family=family)
            shown = f"[{host}]" if ":" in host else host
            self.address = f"tcp:{shown}:{self._socket.getsockname()[1]}"
        else:
            self._listen_unix(directory)
        assert self._socket is not None
        self._socket.setblocking(False)

    def _listen_unix(self, directory: str | None) -> None:
        self._directory = tempfile.mkdtemp(prefix="mobula-", dir=directory)  # mkdtemp makes it 0700
        path = str(Path(self._directory) / "ranks.sock")
        if len(os.fsencode(path)) > _MAX_UNIX_PATH_BYTES:
            self.close()
            raise ValueError(f"{path} is longer than the {_MAX_UNIX_PATH_BYTES} bytes of a unix socket's path: name a shorter directory")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(path)
        self._socket.listen(self._world_size + _NUM_STRANGERS)
        self.address = f"unix:{path}"

    def accept(self, timeout_s: float, check: Callable[[], None] | None) -> list[Member]:
        """Lets every rank in and closes the door. See `GroupListener.accept`."""
        if self._socket is None:
            raise GroupFailed(f"the listener at {self.address} is closed: it has taken its group in already, or was given up")
        reception = _Reception(self._socket, self._world_size, self._secret)
        try:
            members = reception.run(timeout_s, check, self.address)
        finally:
            reception.close()
        self.close()
        return members

    def close(self) -> None:
        """Idempotent. Connections that were let in stay open."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


class _Reception:
    """One `accept`: the strangers at the door and the members inside."""

    def __init__(self, listener: socket.socket, world_size: int, secret: bytes) -> None:
        self._listener = listener
        self._world_size = world_size
        self._secret = secret
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._strangers: dict[Connection, tuple[float, str | None]] = {}  # deadline of the Hello, host
        self._members: dict[int, Member] = {}
        self._refusals: list[str] = []

    def run(self, timeout_s: float, check: Callable[[], None] | None, address: str) -> list[Member]:
        deadline_s = time.monotonic() + timeout_s
        while len(self._members) < self._world_size:
            if check is not None:
                check()
            now_s = time.monotonic()
            if now_s > deadline_s:
                missing = ", ".join(str(rank) for rank in range(self._world_size) if rank not in self._members)
                refused = f"; refused: {'; '.join(self._refusals)}" if self._refusals else ""
                raise GroupFailed(
                    f"rank {missing} of {self._world_size} has not connected to {address} within {timeout_s:g} s{refused}; "
                    "look at that rank's log"
                )
            for connection, (hello_by_s, _) in list(self._strangers.items()):
                if now_s > hello_by_s:
                    self._refuse(connection, "said no Hello")
            for key, _ in self._selector.select(min(deadline_s - now_s, 0.1)):
                if key.fileobj is self._listener:
                    self._let_wait()
                elif key.data in self._strangers:
                    self._hear(key.data)
        members = [self._members[rank] for rank in range(self._world_size)]
        self._members = {}  # theirs now
        return members

    def _let_wait(self) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError:
            return  # it has hung up already
        if len(self._strangers) >= self._world_size + _NUM_STRANGERS:
            sock.close()
            return
        tune(sock)
        connection = Connection(sock, MAX_HELLO_BYTES)
        host = None if sock.family == socket.AF_UNIX else str(peer[0])
        self._strangers[connection] = (time.monotonic() + HELLO_TIMEOUT_S, host)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _hear(self, connection: Connection) -> None:
        try:
            messages = connection.receive()
        except (Disconnected, ValueError) as error:
            self._refuse(connection, str(error))
            return
        if not messages:
            return
        reason = self._judge(messages[0])
        if reason:
            self._refuse(connection, reason)
            return
        hello = messages[0]
        assert isinstance(hello, Hello)
        self._selector.unregister(connection)
        _, host = self._strangers.pop(connection)
        connection.max_frame_bytes = MAX_FRAME_BYTES
        try:
            connection.send(encode(Welcome(self._world_size)))
        except Disconnected:
            connection.close()
            return
        self._members[hello.rank] = Member(hello.rank, hello.pid, hello.start_ticks, connection, host)

    def _judge(self, message: object) -> str:
        """Why the sender of its first message is not let in; empty when it is."""
        if not isinstance(message, Hello) or [type(field) for field in message] != [int, int, int, str]:
            return "the first message is not a Hello"
        if not hmac.compare_digest(message.secret.encode(), self._secret):
            return "the secret is not this group's"
        if not 0 <= message.rank < self._world_size:
            return f"the group has ranks 0 to {self._world_size - 1}, not {message.rank}"
        if message.rank in self._members:
            return f"rank {message.rank} is here already"
        return ""

    def _refuse(self, connection: Connection, reason: str) -> None:
        self._selector.unregister(connection)
        del self._strangers[connection]
        self._refusals = [*self._refusals[-3:], reason]
        with contextlib.suppress(Disconnected):
            connection.send(encode(Refused(reason)))
        connection.close()

    def close(self) -> None:
        """Hangs up on everyone who has not been handed over."""
        for connection in self._strangers:
            connection.close()
        for member in self._members.values():
            member.connection.close()
        self._selector.close()
