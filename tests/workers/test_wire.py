import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import msgpack
import pytest

from cache_store.keys import Layout
from workers.connection import Connection, Disconnected, connect, parse_address
from workers.step import ArenaSpec, BlockCopy, CopyResult, NewRow, RowResult, SamplingSettings, StepPlan, StepResult, StepRow
from workers.wire import (
    LENGTH,
    Ack,
    Close,
    CopiesDone,
    Hello,
    Host,
    Hosted,
    Load,
    Loaded,
    Message,
    Ping,
    Pong,
    Progress,
    RankError,
    RankFacts,
    Refused,
    Unload,
    Unloaded,
    Welcome,
    decode,
    encode,
)

LAYOUT = Layout("gqa", 0, 16, "bfloat16", 8, (4, 2, 16, 64))
FACTS = RankFacts(100, 16, 4096, 32000, LAYOUT, b"{}", None, "bfloat16", 256, 8192, 768, 2, 2)
COPY = BlockCopy(9, 4, 1 << 40, (1 << 64) - 1, 12.5, b"\1" * 64)
NEW_ROW = NewRow(1 << 40, b"\0\1\2\3", 1, 0, [1, 2], SamplingSettings(temperature=0.5, seed=(1 << 64) - 1, num_logprobs=3))

MESSAGES: list[Message] = [
    Hello(3, 1234, 567890, "secret"),
    Welcome(4),
    Refused("no"),
    Unload(),
    Unloaded(),
    Host("127.0.0.1"),
    Hosted(4711),
    Load({"model": "m", "seed": 0, "block_size": None}, "127.0.0.1", 4711),
    Progress("weights", 3, 12),
    Loaded(FACTS),
    ArenaSpec("/dev/shm/arena", 1 << 40, 4096, 65536),
    StepPlan(1, [], [], [], [], []),
    StepPlan(7, [3, 5], [NEW_ROW, NEW_ROW], [StepRow(5, 1, 0, 0, []), StepRow(1 << 40, 512, 0, 0, [7, 8])], [COPY], [COPY, COPY]),
    StepResult(1, [], 0.0),
    StepResult(2, [RowResult(5, [17]), RowResult(6, [])], 0.25),
    StepResult(3, [RowResult(5, [17, 18], [[(17, -0.5), (3, -1.5)], [(18, -0.25)]], None), RowResult(6, [])], 0.25),
    StepResult(4, [RowResult(5, []), RowResult(6, [1], b"\0\0\0\0", [[(4, -2.0)]])], 0.25),
    Ack(9),
    CopiesDone([CopyResult(1, True, b"12345678"), CopyResult(2, False, b"", "generation")]),
    Ping(1),
    Pong(1),
    RankError("ValueError", "no such thing"),
    Close(),
]


def is_exact(value: object, expected: object) -> bool:
    """Equal, and of the same types all the way down: a list is equal to no tuple that a reader could unpack by name."""
    if type(value) is not type(expected) or value != expected:
        return False
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return all(is_exact(left, right) for left, right in zip(value, expected, strict=True))
    return True


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    frame = encode(message)
    assert LENGTH.unpack_from(frame)[0] == len(frame) - LENGTH.size
    assert is_exact(decode(memoryview(frame)[LENGTH.size :]), message)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgpack.packb(17),
        msgpack.packb([99]),
        msgpack.packb([-100]),
        msgpack.packb(["x"]),
        msgpack.packb([12, 1, 2]),
        encode(Ack(1))[LENGTH.size :] + b"\0",
        encode(StepResult(1, [RowResult(1, [2])], 0.0))[LENGTH.size :].replace(b"\x94", b"\x93", 1),
    ],
)
def test_what_is_no_frame_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not a frame"):
        decode(payload)


def test_random_bytes_never_raise_anything_else() -> None:
    draw = random.Random(5)
    good = [encode(message)[LENGTH.size :] for message in MESSAGES]
    for _ in range(3000):
        payload = bytearray(draw.choice(good))
        for _ in range(draw.randint(1, 4)):
            payload[draw.randrange(len(payload))] = draw.randrange(256)
        with contextlib.suppress(ValueError):
            decode(bytes(payload))


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    left, right = map(Connection, socket.socketpair())
    yield left, right
    left.close()
    right.close()


def receive_all(connection: Connection, num_messages: int, sender: Connection | None = None) -> list[Message]:
    messages: list[Message] = []
    deadline_s = time.monotonic() + 10
    while len(messages) < num_messages and time.monotonic() < deadline_s:
        messages += connection.receive()
        if sender is not None:
            sender.flush()
    return messages


def test_frames_of_all_sizes_cross_a_socket_that_takes_little_at_a_time(pair: tuple[Connection, Connection]) -> None:
    draw = random.Random(1)
    left, right = pair
    sent: list[Message] = []
    received: list[Message] = []
    for _ in range(60):
        num_bytes = draw.choice([0, 10, 3000, 65531, 65536, 200_000, 3_000_000])
        message = RankError("x" * draw.randrange(30), "y" * num_bytes)
        sent.append(message)
        left.send(encode(message))
        if draw.random() < 0.5:
            received += right.receive()
            left.flush()
    received += receive_all(right, len(sent) - len(received), left)
    assert received == sent
    assert left.num_unsent_frames == 0


def test_a_slow_reader_blocks_nobody_and_drain_gives_up(pair: tuple[Connection, Connection]) -> None:
    left, _right = pair
    frame = encode(RankError("x", "y" * 1_000_000))
    started_s = time.monotonic()
    for _ in range(10):
        left.send(frame)
    assert left.num_unsent_frames >= 9
    with pytest.raises(TimeoutError):
        left.drain(0.05)
    assert time.monotonic() - started_s < 5


def test_drain_waits_for_a_reader(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    frames = [RankError("x", "y" * 1_000_000)] * 5
    thread = threading.Thread(target=lambda: receive_all(right, 5))
    thread.start()
    for message in frames:
        left.send(encode(message))
    left.drain(10)
    thread.join(10)
    assert left.num_unsent_frames == 0


def test_last_words_are_heard_before_the_end(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    for number in range(3):
        left.send(encode(Ping(number)))
    left.close()
    assert receive_all(right, 3) == [Ping(0), Ping(1), Ping(2)]
    with pytest.raises(Disconnected):
        right.receive()


def test_a_frame_over_the_limit_is_refused_before_it_is_read(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    right.max_frame_bytes = 100
    left.send(encode(RankError("x", "y" * 200)))
    with pytest.raises(ValueError, match="over the limit of 100 bytes"):
        right.receive()


def test_addresses() -> None:
    assert parse_address("unix:/a/b") == (socket.AF_UNIX, "/a/b")
    assert parse_address("tcp:10.0.0.1:5") == (socket.AF_INET, ("10.0.0.1", 5))
    assert parse_address("tcp:[::1]:5") == (socket.AF_INET6, ("::1", 5))
    for bad in ("", "unix:", "/a/b", "tcp:host", "tcp::5", "tcp:host:x", "http:host:5"):
        with pytest.raises(ValueError, match="address"):
            parse_address(bad)


def test_connecting_where_nobody_listens_has_a_deadline(tmp_path: object) -> None:
    with pytest.raises(Disconnected, match="no engine answers"):
        connect(f"unix:{tmp_path}/none", 0.2)
