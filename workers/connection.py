"""A socket that speaks the frames of `workers.wire`, and how an engine and its ranks find each other."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque

from workers.wire import LENGTH, MAX_FRAME_BYTES, Message, decode

_BUFFER_BYTES = 1 << 16


class Disconnected(Exception):
    """The other end has closed the connection, or is gone."""


class Connection:
    """One end of a socket that speaks frames. Never blocks, except in `drain`. Used by one thread."""

    def __init__(self, sock: socket.socket, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.max_frame_bytes = max_frame_bytes
        self.bytes_received = 0
        self._unsent: deque[memoryview] = deque()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start = 0  # of what has been received and not yet decoded
        self._end = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def num_unsent_frames(self) -> int:
        return len(self._unsent)

    def send(self, frame: bytes) -> None:
        """Sends what the socket takes now and keeps the rest for `flush`. Disconnected when the other end is gone."""
        self._unsent.append(memoryview(frame))
        self.flush()

    def flush(self) -> bool:
        """Goes on sending; True when nothing is left. Disconnected when the other end is gone."""
        try:
            while self._unsent:
                frame = self._unsent[0]
                num_sent = self._socket.send(frame)
                if num_sent < len(frame):
                    self._unsent[0] = frame[num_sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return False
        except OSError as error:
            raise Disconnected(f"cannot send: {error}") from error
        return True

    def drain(self, timeout_s: float) -> None:
        """Waits until all is sent. TimeoutError when the other end has not read it within `timeout_s`; Disconnected."""
        deadline_s = time.monotonic() + timeout_s
        writable = select.poll()
        writable.register(self._socket, select.POLLOUT)
        while not self.flush():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"the other end has not read {len(self._unsent)} frames within {timeout_s:g} s")
            writable.poll(left_s * 1000)

    def receive(self) -> list[Message]:
        """Every whole message that is there. Disconnected at the end of the stream, ValueError for what is not a frame."""
        messages: list[Message] = []
        try:
            while self._read_some():
                self._take_messages(messages)
                if messages and self._start == self._end:
                    break  # nothing half-read: the next call finds what came meanwhile
        except Disconnected:
            if not messages:
                raise  # else the next call does: the last words come first
        return messages

    def _read_some(self) -> bool:
        """One read into the buffer. False when nothing is there."""
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > _BUFFER_BYTES:
                self._buffer = bytearray(_BUFFER_BYTES)
        try:
            num_read = self._socket.recv_into(memoryview(self._buffer)[self._end :])
        except BlockingIOError:
            return False
        except OSError as error:
            raise Disconnected(f"cannot receive: {error}") from error
        if num_read == 0:
            raise Disconnected("closed by the other end")
        self._end += num_read
        self.bytes_received += num_read
        return True

    def _take_messages(self, messages: list[Message]) -> None:
        """Decodes the whole frames in the buffer, and makes room for the rest of one that is not whole."""
        while self._end - self._start >= LENGTH.size:
            (num_bytes,) = LENGTH.unpack_from(self._buffer, self._start)
            if num_bytes > self.max_frame_bytes:
                raise ValueError(f"a frame of {num_bytes} bytes is over the limit of {self.max_frame_bytes} bytes")
            first = self._start + LENGTH.size
            if first + num_bytes > self._end:
                self._make_room(LENGTH.size + num_bytes)
                return
            messages.append(decode(memoryview(self._buffer)[first : first + num_bytes]))
            self._start = first + num_bytes
        self._make_room(LENGTH.size)

    def _make_room(self, num_bytes: int) -> None:
        """Moves what is undecoded to the front of a buffer that can hold `num_bytes` of it."""
        if self._start + num_bytes <= len(self._buffer):
            return
        held = self._buffer[self._start : self._end]
        buffer = self._buffer if num_bytes <= len(self._buffer) else bytearray(num_bytes)
        buffer[: len(held)] = held
        self._buffer, self._start, self._end = buffer, 0, len(held)

    def close(self) -> None:
        self._socket.close()

    def close_after_last_word(self, timeout_s: float) -> None:
        """Closes so that the other end reads all that was sent: closing with unread input would throw it away on TCP."""
        deadline_s = time.monotonic() + timeout_s
        with contextlib.suppress(OSError, TimeoutError, Disconnected):
            self.drain(timeout_s)
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(max(deadline_s - time.monotonic(), 0.001))
            while self._socket.recv(_BUFFER_BYTES) and time.monotonic() < deadline_s:
                pass
        self._socket.close()


def parse_address(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Reads "unix:/path" or "tcp:host:port". ValueError for anything else."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and rest:
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdecimal():
        host = host.strip("[]")
        return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))
    raise ValueError(f"a group's address must read unix:/path or tcp:host:port, not {address!r}")


def tune(sock: socket.socket) -> None:
    """TCP: small frames leave at once, and a machine that vanished without a word is noticed within half a minute."""
    if sock.family == socket.AF_UNIX:
        return
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 10),
        (socket.TCP_KEEPINTVL, 5),
        (socket.TCP_KEEPCNT, 4),
        (socket.TCP_USER_TIMEOUT, 30_000),  # milliseconds
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def connect(address: str, timeout_s: float) -> socket.socket:
    """Connects, trying again while nobody listens there yet. Disconnected after `timeout_s`."""
    family, target = parse_address(address)
    deadline_s = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(deadline_s - time.monotonic(), 0.05))
            sock.connect(target)
            tune(sock)
            return sock
        except OSError as error:
            sock.close()
            if time.monotonic() + 0.05 > deadline_s:
                raise Disconnected(f"no engine answers at {address} within {timeout_s:g} s: {error}") from error
            time.sleep(0.05)
