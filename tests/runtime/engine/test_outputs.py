from __future__ import annotations

import pytest
from engine_parts import Bench

from runtime.engine.frames import RequestOutput
from runtime.engine.live import LiveRequest
from runtime.request import FinishReason
from workers.step import RowResult, SamplingSettings, StepResult


def apply(bench: Bench, *rows: RowResult) -> list[LiveRequest]:
    """The result of the oldest launched step; row ids are filled in."""
    launched = bench.launched.pop(0)
    filled = [row._replace(row_id=step_row.row_id) for row, step_row in zip(rows, launched.plan.rows, strict=True)]
    finished = bench.outputs.apply(launched, StepResult(launched.plan.sequence, filled, 0.0), 7.0)
    for live in finished:
        bench.scheduler.remove(live)
    return finished


def told(bench: Bench) -> list[RequestOutput]:
    return bench.outputs.take().get(0, [])


def test_the_first_output_carries_what_was_cached_and_the_last_the_reason() -> None:
    bench = Bench()
    live = bench.add("a", 3, max_tokens=3)
    live.admitted_s, live.store_wait_s = 5.0, 1.5
    bench.plan()
    (admitting,) = bench.launched
    apply(bench, RowResult(0, [11]))
    for token in (12, 13):
        bench.plan()
        apply(bench, RowResult(0, [token]))
    bench.outputs.admitted(admitting)  # again, as after a preemption
    first, *tokens, last = told(bench)
    assert first == RequestOutput("a", [], cached=[0, 0, 0, 0], receipt=[3, 0, {"partial_block": 3}])
    assert tokens == [RequestOutput("a", [11]), RequestOutput("a", [12])]
    assert last == RequestOutput("a", [13], finish_reason="length", timings=[3.5, 1.5])
    assert bench.outputs.take() == {}


def test_the_middle_of_a_prompt_says_nothing() -> None:
    bench = Bench()
    bench.add("a", 20)
    bench.plan()
    assert [output.cached for output in told(bench)] == [[0, 0, 0, 0]]
    apply(bench, RowResult(0, []))
    assert told(bench) == []


@pytest.mark.parametrize(
    ("tokens", "kept", "reason"),
    [([5, 6], [5, 6], None), ([5, 77, 6], [5, 77], "stop"), ([5, 6, 7, 8], [5, 6, 7], "length"), ([77], [77], "stop")],
)
def test_several_tokens_of_one_step_end_where_they_must(tokens: list[int], kept: list[int], reason: str | None) -> None:
    bench = Bench()
    bench.add("a", 3, max_tokens=3, end_token_ids=frozenset({77}))
    bench.plan()
    apply(bench, RowResult(0, tokens, [[(token, -0.5)] for token in tokens]))
    _, output = told(bench)
    assert (output.token_ids, output.finish_reason) == (kept, reason)
    assert output.logprobs == [[(token, -0.5)] for token in kept]


def test_an_end_token_at_the_limit_is_a_stop() -> None:
    bench = Bench()
    bench.add("a", 3, max_tokens=1, end_token_ids=frozenset({77}))
    bench.plan()
    apply(bench, RowResult(0, [77]))
    assert told(bench)[1].finish_reason == "stop"


def test_raw_logprobs_are_cut_with_their_tokens() -> None:
    bench = Bench()
    bench.add("a", 3, max_tokens=1, sampling=SamplingSettings(num_logprobs=-1))
    bench.plan()
    apply(bench, RowResult(0, [5, 6], b"12345678abcdefgh"))
    assert told(bench)[1].logprobs == b"12345678"


def test_max_tokens_zero_computes_the_prompt_and_drops_the_sample() -> None:
    bench = Bench()
    live = bench.add("a", 3, max_tokens=0, sampling=SamplingSettings(num_prompt_logprobs=0))
    bench.plan()
    scored = [[(1, -1.0)], [(2, -2.0)]]
    assert apply(bench, RowResult(0, [9], None, scored)) == [live]
    _, output = told(bench)
    assert (output.token_ids, output.prompt_logprobs, output.finish_reason) == ([], scored, "length")


def test_prompt_logprobs_are_told_chunk_by_chunk() -> None:
    bench = Bench()
    live = bench.add("a", 20, sampling=SamplingSettings(num_prompt_logprobs=0))
    bench.plan()
    apply(bench, RowResult(0, [], None, [[(1, -1.0)]] * 16))
    assert live.num_prompt_scored == 17
    bench.plan()
    apply(bench, RowResult(0, [3], None, [[(1, -1.0)]] * 3))
    admitted, first, second = told(bench)
    assert [output.cached for output in (admitted, first, second)] == [[0, 0, 0, 0], None, None]
    assert (len(first.prompt_logprobs or ()), len(second.prompt_logprobs or ())) == (16, 3)
    assert live.row_sampling().num_prompt_logprobs is None, "a later row of this request has nothing to score"


def test_a_row_that_comes_back_scores_only_what_is_left() -> None:
    bench = Bench()
    live = bench.add("a", 20, sampling=SamplingSettings(num_prompt_logprobs=0, prompt_logprobs_start=2))
    assert live.row_sampling().prompt_logprobs_start == 2
    bench.plan()
    apply(bench, RowResult(0, [], None, [[(1, -1.0)]] * 15))
    assert live.row_sampling().prompt_logprobs_start == 17
    assert live.num_reusable_blocks(4) == 4


def test_an_end_from_outside_is_told_once_with_everything() -> None:
    bench = Bench()
    live = bench.add("a", 3)
    live.store_wait_s = 0.25
    bench.outputs.end(live, 2.0, reason=FinishReason.ABORT)
    assert told(bench) == [RequestOutput("a", [], cached=[0, 0, 0, 0], finish_reason="abort", timings=[1.75, 0.25], receipt=[0, 0, {}])]
    other = bench.add("b", 3)
    bench.outputs.end(other, 2.0, error=("DeadlinePassed", "late"))
    assert told(bench) == [RequestOutput("b", [], cached=[0, 0, 0, 0], error=["DeadlinePassed", "late"], receipt=[0, 0, {}])]


def test_outputs_are_sorted_by_stream() -> None:
    bench = Bench()
    bench.outputs.refuse(4, "x", ("Overloaded", "full"))
    bench.outputs.refuse(9, "x", ("Overloaded", "full"))
    assert {stream: [output.request_id for output in batch] for stream, batch in bench.outputs.take().items()} == {4: ["x"], 9: ["x"]}
