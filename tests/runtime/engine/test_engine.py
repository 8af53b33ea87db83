"""The engine's thread against a simulated group in real time: submit, abort, deadlines, failure, the weights digest, idleness."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterator

import pytest
from engine_parts import make_request
from realtime import WAIT_S, RealtimeGroup, Running, expected, wait_until
from simulated_group import make_info

from cache_store.keys import salted_root
from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.frames import Load
from runtime.engine.live import EngineRequest
from runtime.errors import DuplicateRequest, GroupFailed, Overloaded

Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Running] = []

    def begin(group: RealtimeGroup | None = None, **config: object) -> Running:
        running = Running(group or RealtimeGroup(make_info(64, max_model_len=200)), **config)
        started.append(running)
        return running

    yield begin
    for running in started:
        running.close()


def test_requests_from_several_threads_get_their_tokens(start: Start) -> None:
    running = start()

    def client(number: int) -> None:
        for i in range(5):
            running.engine.submit(make_request(f"{number}.{i}", [number, i, 7], max_tokens=6))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        for i in range(5):
            assert running.tokens(f"{number}.{i}") == expected([number, i, 7], 6)
    wait_until(lambda: running.engine.stats().num_running == 0)
    stats = running.engine.stats()
    assert (stats.used_pages, stats.total_pages, stats.store_state) == (0, 63, "none")
    assert running.engine.check() == []


def test_a_group_smaller_than_the_settings_bounds_every_step(start: Start) -> None:
    """The simulated group judges each plan by its own limits."""
    running = start(RealtimeGroup(make_info(64, max_model_len=200, max_num_seqs=2, max_num_batched_tokens=5)), max_num_seqs=64)
    for number in range(6):
        running.engine.submit(make_request(str(number), [number] * 12, max_tokens=6))
    for number in range(6):
        assert running.tokens(str(number)) == expected([number] * 12, 6)


def test_an_idle_engine_does_not_spin(start: Start) -> None:
    running = start(idle_poll_s=0.2)
    wait_until(lambda: running.group.num_polls > 0)
    before, cpu_s = running.group.num_polls, time.thread_time()
    time.sleep(0.5)  # what is measured is how often it wakes in this time
    assert running.group.num_polls - before <= 5
    assert time.thread_time() - cpu_s < 0.2
    began_s = time.monotonic()
    running.engine.submit(make_request("a", [1, 2, 3], max_tokens=1))
    running.last("a")
    assert time.monotonic() - began_s < 5


def test_an_abort_ends_a_running_request(start: Start) -> None:
    running = start(RealtimeGroup(make_info(64, max_model_len=200), step_s=0.002))
    running.engine.submit(make_request("a", [1, 2, 3], max_tokens=190))
    running.engine.submit(make_request("b", [4, 5], max_tokens=3))
    running.last("b")
    running.engine.abort((0, "a"))
    last = running.last("a")
    assert last.finish_reason == "abort"
    assert last.timings is not None
    assert running.tokens("a") == expected([1, 2, 3], 190)[: len(running.tokens("a"))]
    wait_until(lambda: running.engine.stats().used_pages == 0)
    running.engine.abort((0, "a"))  # nothing happens
    running.engine.abort((0, "never"))


def test_a_found_stop_string_ends_a_request_with_reason_stop(start: Start) -> None:
    running = start(RealtimeGroup(make_info(64, max_model_len=200), step_s=0.002))
    running.engine.submit(make_request("a", [1, 2, 3], max_tokens=190))
    running.engine.abort((0, "a"), "stop", 0)
    assert running.last("a").finish_reason == "stop"


def test_a_deadline_ends_a_request_wherever_it_is(start: Start) -> None:
    group = RealtimeGroup(make_info(64, max_model_len=200))
    group.gate.clear()
    running = start(group, max_num_seqs=1, idle_poll_s=0.5)
    now_s = time.monotonic()
    for name in ("running", "waiting"):
        running.engine.submit(make_request(name, [1, 2, 3], deadline_s=now_s + 0.1))
    for name in ("running", "waiting"):
        error = running.last(name).error
        assert error is not None
        assert error[0] == "DeadlinePassed"
    assert time.monotonic() - now_s < 5
    running.group.gate.set()
    running.group.wake()
    wait_until(lambda: running.engine.stats().used_pages == 0)


def test_a_full_queue_refuses_with_a_hint_and_takes_again_later(start: Start) -> None:
    group = RealtimeGroup(make_info(64, max_model_len=200))
    group.gate.clear()
    running = start(group, max_queued_requests=3, max_num_seqs=1, max_num_batched_tokens=8, retry_after_ms=70)
    running.engine.submit(make_request("r0", [1, 2, 3], max_tokens=2))
    wait_until(lambda: running.engine.load.num_running == 1)
    names = [f"r{i}" for i in range(4)]
    for name in names[1:]:
        running.engine.submit(make_request(name, [1, 2, 3], max_tokens=2))
    with pytest.raises(Overloaded) as refused:
        running.engine.submit(make_request("r4", [1, 2, 3], max_tokens=2))
    assert refused.value.retry_after_ms == 70
    group.gate.set()
    group.wake()
    for name in names:
        assert running.last(name).finish_reason == "length"
    wait_until(lambda: running.engine.load == Load(0, 0, 0))
    running.engine.submit(make_request("again", [1], max_tokens=1))
    assert running.last("again").finish_reason == "length"


def test_queued_tokens_are_bounded_but_one_prompt_always_fits(start: Start) -> None:
    group = RealtimeGroup(make_info(64, max_model_len=200))
    group.gate.clear()
    running = start(group, max_queued_tokens=20, max_num_seqs=1)
    running.engine.submit(make_request("big", list(range(50)), max_tokens=1))
    with pytest.raises(Overloaded, match="prompt tokens wait"):
        running.engine.submit(make_request("more", [1, 2], max_tokens=1))
    group.gate.set()
    group.wake()
    assert running.last("big").finish_reason == "length"


def test_a_live_request_id_is_refused_in_its_stream_only(start: Start) -> None:
    group = RealtimeGroup(make_info(64, max_model_len=200))
    group.gate.clear()
    running = start(group)
    running.engine.submit(make_request("a", [1, 2], max_tokens=1))
    with pytest.raises(DuplicateRequest):
        running.engine.submit(make_request("a", [3], max_tokens=1))
    other = make_request("a", [3], max_tokens=1)
    running.engine.submit(EngineRequest(1, "a", other.prompt, other.sampling, 1))
    group.gate.set()
    group.wake()
    assert running.tokens("a", stream=1) == expected([3], 1)
    running.last("a")
    wait_until(lambda: running.engine.stats().num_running == 0)
    running.engine.submit(make_request("a", [4], max_tokens=1))


def test_a_dead_group_fails_every_live_request(start: Start) -> None:
    group = RealtimeGroup(make_info(64, max_model_len=200))
    group.gate.clear()
    running = start(group, max_num_seqs=1)
    for name in ("running", "waiting"):
        running.engine.submit(make_request(name, [1, 2, 3]))
    wait_until(lambda: running.engine.load.num_waiting == 1)
    group.failure = GroupFailed("rank 1 has gone")
    group.wake()
    for name in ("running", "waiting"):
        assert running.last(name).error == ["GroupFailed", "rank 1 has gone"]
    running.thread.join(WAIT_S)
    assert [str(failure) for failure in running.failure] == ["rank 1 has gone"]
    with pytest.raises(GroupFailed, match="rank 1 has gone"):
        running.engine.submit(make_request("late", [1]))


def test_a_stopped_engine_tells_its_requests(start: Start) -> None:
    group = RealtimeGroup(make_info(64, max_model_len=200), step_s=0.002)
    running = start(group)
    running.engine.submit(make_request("a", [1, 2, 3], max_tokens=190))
    running.engine.stop()
    error = running.last("a").error
    assert error is not None
    assert error[0] == "ReplicaLost"
    running.thread.join(WAIT_S)
    assert running.failure == [None]
    assert running.engine.blocks.num_used == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "fits"), [(199, 1, True), (200, 1, False), (200, 0, True), (1, 10_000, True), (0, 5, False)]
)
def test_a_prompt_that_cannot_fit_is_refused(start: Start, prompt: int, max_tokens: int, fits: bool) -> None:
    running = start()
    running.engine.submit(make_request("a", list(range(prompt)), max_tokens=max_tokens))
    last = running.last("a")
    if fits:
        assert last.finish_reason == "length"
        assert len(running.tokens("a")) == min(max_tokens, 200 - prompt)
    else:
        assert last.error is not None
        assert last.error[0] == "BadRequest"
        assert last.error[1].startswith("prompt:")


def test_the_pool_bounds_the_context(start: Start) -> None:
    running = start(RealtimeGroup(make_info(6, max_model_len=200)))
    assert running.engine.hello().max_model_len == 20
    running.engine.submit(make_request("a", [1, 2, 3], max_tokens=100))
    assert running.last("a").finish_reason == "length"
    assert len(running.tokens("a")) == 17


def test_a_resumed_request_that_was_over_ends_at_once(start: Start) -> None:
    running = start()
    running.engine.submit(make_request("length", [1, 2], max_tokens=2, output=array("I", [5, 6])))
    running.engine.submit(make_request("stop", [1, 2], max_tokens=9, output=array("I", [5, 7]), end_token_ids=frozenset({7})))
    assert running.last("length").finish_reason == "length"
    assert running.last("stop").finish_reason == "stop"
    assert running.tokens("stop") == []


def test_blocks_are_shared_within_a_tenant_only(start: Start) -> None:
    running = start()
    prompt = list(range(30))
    cached = {}
    for name, tenant, salt in (("a", "", ""), ("b", "", ""), ("c", "other", ""), ("d", "", "pepper"), ("e", "other", "")):
        running.engine.submit(make_request(name, prompt, max_tokens=1, tenant=tenant, cache_salt=salt))
        running.last(name)
        cached[name] = running.outputs[0, name][0].cached
    assert cached == {"a": [0] * 4, "b": [28, 0, 0, 0], "c": [0] * 4, "d": [0] * 4, "e": [28, 0, 0, 0]}


def test_blocks_survive_the_arrival_of_the_digest(start: Start) -> None:
    """Until the digest is known keys hang on a local root; a request that runs meanwhile is found under the real one."""
    ready = threading.Event()

    def digest() -> bytes:
        assert ready.wait(WAIT_S)
        return b"weights"

    group = RealtimeGroup(make_info(64, max_model_len=200, weights_digest=None), step_s=0.003)
    running = start(group, digest=digest)
    assert running.engine.hello().root is None
    prompt = list(range(30))
    for name in ("early", "early too"):
        running.engine.submit(make_request(name, prompt, max_tokens=4))
        running.last(name)
    assert running.outputs[0, "early too"][0].cached == [28, 0, 0, 0], "the local root serves as long as there is no other"
    running.engine.submit(make_request("long", [*range(50, 80)], max_tokens=100))
    wait_until(lambda: len(running.outputs.get((0, "long"), ())) > 3)
    ready.set()
    wait_until(lambda: running.engine.hello().root is not None)
    assert running.tokens("long") == expected([*range(50, 80)], 100)
    running.engine.submit(make_request("late", [*range(50, 80)], max_tokens=1))
    running.last("late")
    assert running.outputs[0, "late"][0].cached == [28, 0, 0, 0]
    root = running.engine.hello().root
    assert root is not None
    assert all(block.parent == salted_root(root, "", "") for block in running.engine.blocks.published() if not block.depth)


def test_roots_differ_by_weights_and_numerics(start: Start) -> None:
    roots = {
        start(RealtimeGroup(make_info(64, weights_digest=digest)), numerics=numerics).engine.hello().root
        for digest in (b"w1", b"w2")
        for numerics in ("fast", "exact")
    }
    assert len(roots) == 4
    same = start(RealtimeGroup(make_info(64, weights_digest=b"w1")), numerics="fast").engine.hello()
    assert same.root in roots
    assert same.weights_digest == b"w1"


def test_step_age_shows_a_group_that_hangs(start: Start) -> None:
    group = RealtimeGroup(make_info(64, max_model_len=200))
    group.gate.clear()
    running = start(group)
    assert running.engine.stats().step_age_s == 0.0
    running.engine.submit(make_request("a", [1, 2], max_tokens=1))
    wait_until(lambda: running.engine.stats().step_age_s > 0.05)
    group.gate.set()
    group.wake()
    running.last("a")
    wait_until(lambda: running.engine.stats().step_age_s == 0.0)


def test_what_a_request_reuses_is_told_while_its_prompt_is_computed(start: Start) -> None:
    group = RealtimeGroup(make_info(64, max_model_len=200))
    running = start(group)
    running.engine.submit(make_request("first", range(40), max_tokens=1))
    running.last("first")
    group.gate.clear()
    running.engine.submit(make_request("a", range(41), max_tokens=2))
    wait_until(lambda: bool(running.outputs.get((0, "a"))))
    [first] = running.outputs[0, "a"]
    assert (first.token_ids, first.cached) == ([], [40, 0, 0, 0])
    group.gate.set()
    group.wake()
    assert running.tokens("a") == expected(list(range(41)), 2)
    assert [output.cached for output in running.outputs[0, "a"][1:]] == [None, None]


def test_settings_that_cannot_work_are_refused() -> None:
    for bad in ({"pipeline_depth": 3}, {"max_num_seqs": 0}, {"max_prompt_tokens_beside_outputs": 0}, {"copy_timeout_s": 50.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EngineConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 pages"):
        Engine(EngineConfig(), RealtimeGroup(make_info(1)), None, lambda _outputs, _load: None)
