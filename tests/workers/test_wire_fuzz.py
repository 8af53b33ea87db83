"""Bytes that no rank would send: decoding says ValueError and nothing else, and strangers do not keep a group from forming."""

from __future__ import annotations

import os
import random
import select
import threading
from collections import Counter
from pathlib import Path

import msgpack
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from workers.config import WorkerConfig
from workers.connection import Connection, Disconnected, connect
from workers.group import GroupListener, RankGroup
from workers.local import RankPool
from workers.step import BlockCopy, NewRow, RowResult, SamplingSettings, StepPlan, StepResult, StepRow
from workers.wire import LENGTH, Ack, CopiesDone, Hello, Message, Ping, Progress, RankError, Refused, decode, encode
from workers.worker import ECHO

SECRET = "s3cret"
NUM_EXAMPLES = int(os.environ.get("MOBULA_FUZZ_EXAMPLES", "120"))
NUM_STRANGERS = 120
GOOD: list[Message] = [
    Hello(0, 1, 1, "guess"),
    Ack(1),
    Ping(1),
    Progress("weights", 1, 2),
    RankError("ValueError", "no"),
    CopiesDone([]),
    StepResult(2, [RowResult(5, [17]), RowResult(6, [])], 0.25),
    StepPlan(
        1, [3], [NewRow(1, b"\0\1\2\3", 1, 0, [1], SamplingSettings())], [StepRow(5, 1, 0, 0, [])], [], [BlockCopy(9, 4, 1, 1, 1.5, b"")]
    ),
]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(max_size=8), st.binary(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=8,
)


@st.composite
def one_field_wrong(draw: st.DrawFn) -> bytes:
    fields = list(msgpack.unpackb(encode(draw(st.sampled_from(GOOD)))[LENGTH.size :]))
    fields[draw(st.integers(0, len(fields) - 1))] = draw(VALUES)
    return bytes(msgpack.packb(fields))


PAYLOADS = st.one_of(one_field_wrong(), VALUES.map(msgpack.packb), st.binary(max_size=60))


@settings(
    max_examples=5 * NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(PAYLOADS)
def test_decoding_says_value_error_and_nothing_else(payload: bytes) -> None:
    try:
        message = decode(payload)
    except ValueError:
        return
    if isinstance(message, Hello):
        assert [type(field) for field in message] == [int, int, int, str]


def noise(rng: random.Random) -> bytes:
    """What a stranger says: a frame of noise, a frame that is no Hello, a wrong length, half a frame, or nothing."""
    kind = rng.randrange(5)
    if kind == 0:
        payload = rng.randbytes(rng.randrange(60))
        return LENGTH.pack(len(payload)) + payload
    if kind == 1:
        return encode(rng.choice(GOOD))
    if kind == 2:
        return rng.randbytes(rng.randrange(1, 40))
    return encode(rng.choice(GOOD))[: rng.randrange(8)] if kind == 3 else b""


def test_a_crowd_of_strangers_does_not_keep_a_group_from_forming() -> None:
    rng, answers = random.Random(7), Counter[str]()
    groups: list[RankGroup] = []
    root = Path(__file__).parents[2]
    with RankPool(1, env={"PYTHONPATH": str(root)}) as pool, GroupListener(1, secret=SECRET) as listener:
        accepting = threading.Thread(target=lambda: groups.append(listener.accept(60.0)))
        accepting.start()
        for _ in range(NUM_STRANGERS):
            stranger = Connection(connect(listener.address, 5))
            try:
                stranger.send(noise(rng))
                select.select([stranger], [], [], 0.005)
                for answer in stranger.receive():
                    answers[type(answer).__name__] += 1
            except Disconnected:
                answers["hung up"] += 1
            finally:
                stranger.close()
        pool.serve(listener.address, 1, SECRET, parts=ECHO)
        accepting.join(60.0)
        (group,) = groups
        with group:
            group.load(WorkerConfig(model="none", tensor_parallel_size=1, device="cpu"), lambda *progress: None, timeout_s=60.0)
            group.submit(StepPlan(1, [], [], [StepRow(5, 1, 0, 0, [])], [], []))
            assert group.poll(10.0)
    print(f"\nstrangers: {NUM_STRANGERS}; {dict(answers)}")
    assert set(answers) <= {Refused.__name__, "hung up"}
    assert answers[Refused.__name__] > 20
