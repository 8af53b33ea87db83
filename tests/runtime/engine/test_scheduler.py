"""The scheduler alone: state in, plan out. Results are given by hand (engine_parts.Bench)."""

from __future__ import annotations

from array import array

import pytest
from engine_parts import BLOCK_SIZE, Bench

from runtime.engine.config import EngineConfig, StepLimits
from runtime.engine.live import LoadGate, Phase
from workers.step import NULL_PAGE, BlockCopy, SamplingSettings, StepPlan


def test_a_prompt_is_computed_in_chunks_and_then_token_by_token() -> None:
    bench = Bench()
    live = bench.add("a", 40, max_tokens=3)
    assert [bench.step() for _ in range(6)] == [{"a": 16}, {"a": 16}, {"a": 8}, {"a": 1}, {"a": 1}, None]
    assert live.phase is Phase.FINISHED
    assert live.num_outputs == 3


def test_the_first_plan_carries_the_row() -> None:
    bench = Bench()
    live = bench.add("a", [7, 8, 9, 10, 11], max_tokens=2)
    bench.plan()
    plan = bench.launched[0].plan
    (row,) = plan.rows_in
    assert array("I", row.token_ids).tolist() == [7, 8, 9, 10, 11]
    assert (row.num_prompt_tokens, row.num_computed_tokens, len(row.pages)) == (5, 0, 2)
    assert NULL_PAGE not in row.pages
    assert plan.rows == [(row.row_id, 5, 0, 0, [])]
    assert plan.sequence == 1
    assert live.row_id == row.row_id


def test_rows_are_told_of_a_page_only_when_they_need_it() -> None:
    bench = Bench()
    bench.add("a", 3, max_tokens=12)
    appended = []
    for _ in range(12):
        bench.plan()
        appended.append(len(bench.launched[0].plan.rows[0].new_pages))
        bench.apply()
    assert appended == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]  # positions 4, 8, 12


def test_no_step_passes_its_token_budget_and_outputs_come_first() -> None:
    bench = Bench(max_num_batched_tokens=10)
    for i in range(4):
        bench.add(f"short{i}", 2, max_tokens=50)
    bench.step()
    bench.add("long", 100)
    for _ in range(5):
        planned = bench.step()
        assert planned is not None
        assert sum(planned.values()) <= 10
        assert [planned[f"short{i}"] for i in range(4)] == [1, 1, 1, 1]
        assert planned["long"] == 6


def test_no_more_rows_than_allowed() -> None:
    bench = Bench(max_num_seqs=3)
    for i in range(5):
        bench.add(f"r{i}", 2, max_tokens=4)
    assert set(bench.step() or ()) == {"r0", "r1", "r2"}
    for _ in range(3):
        bench.step()
    assert set(bench.step() or ()) == {"r3", "r4"}


@pytest.mark.parametrize(
    ("wanted", "limits"),
    [
        ({}, (256, 8192, 768)),
        ({"max_num_seqs": 300, "max_num_batched_tokens": 9000}, (300, 8192, 768)),
        ({"max_num_seqs": 999, "max_num_batched_tokens": 2048, "max_prompt_tokens_beside_outputs": 4096}, (400, 2048, 4096)),
    ],
)
def test_settings_hold_within_the_limits_of_the_group(wanted: dict[str, int], limits: tuple[int, int, int]) -> None:
    assert EngineConfig(**wanted).step_limits(400, 8192, 768) == limits  # type: ignore[arg-type]


def test_a_budget_below_the_row_limit_bounds_the_rows() -> None:
    assert StepLimits(max_num_seqs=256, max_num_batched_tokens=5, max_prompt_tokens_beside_outputs=3).max_rows == 5
    bench = Bench(max_num_seqs=8, max_num_batched_tokens=3)
    for i in range(6):
        bench.add(f"r{i}", 1, max_tokens=20)
    bench.step()
    assert bench.step() == {"r0": 1, "r1": 1, "r2": 1}


def test_admission_is_first_come_first_served() -> None:
    bench = Bench(num_pages=8)
    bench.add("first", 16)
    bench.step()
    bench.add("big", 16)  # does not fit beside the first
    bench.add("small", 2)
    assert bench.step() == {"first": 1}


def test_a_short_prompt_is_not_starved_by_a_long_one() -> None:
    bench = Bench(num_pages=400, max_model_len=1000, max_num_batched_tokens=16)
    bench.add("long", 600)
    bench.step()
    bench.add("short", 6)
    steps = 0
    while "short" not in (planned := bench.step() or {}) or bench.scheduler.waiting:
        steps += 1
    assert steps == 0
    assert planned["long"] >= 12 - BLOCK_SIZE  # the one in front keeps most of the step
    while bench.scheduler.running[-1].num_outputs == 0:
        bench.step()
        steps += 1
    assert steps <= 2


def prompt_bench(**config: object) -> Bench:
    """As an engine is set up on the CPU; prompts of thousands of tokens fit."""
    return Bench(num_pages=4000, max_model_len=10_000, **{"max_num_batched_tokens": 2048, **config})


def test_a_prompt_alone_gets_the_whole_step() -> None:
    bench = prompt_bench()
    bench.add("long", 5000)
    assert [bench.step() for _ in range(4)] == [{"long": 2048}, {"long": 2048}, {"long": 904}, {"long": 1}]


def test_a_prompt_beside_outputs_gets_a_part_of_the_step() -> None:
    bench = prompt_bench()
    bench.add("running", 4, max_tokens=6)
    bench.step()
    bench.add("long", 9000)
    assert [bench.step() for _ in range(5)] == [{"running": 1, "long": 767}] * 5, "768 in all, which need no padding"
    assert bench.step() == {"long": 2048}, "nobody waits for this step"


def test_all_prompts_beside_outputs_share_that_part() -> None:
    bench = prompt_bench(max_prompt_tokens_beside_outputs=100)
    bench.add("running", 4, max_tokens=50)
    bench.step()
    prompts = [bench.add("long", 1500)]
    assert bench.step() == {"running": 1, "long": 100}
    prompts += [bench.add("short", 40), bench.add("next", 300)]
    assert bench.step() == {"running": 1, "long": 75, "short": 25}, "a quarter for shorter ones, as of any other step"
    while names := {live.request.request_id for live in prompts if not live.num_outputs}:
        left = bench.scheduler.num_queued_tokens
        planned = bench.step() or {}
        assert planned["running"] == 1
        assert sum(count for name, count in planned.items() if name in names) == min(100, left)


def test_a_preempted_request_is_computed_again_as_a_prompt() -> None:
    bench = Bench(num_pages=300, max_num_batched_tokens=200, max_prompt_tokens_beside_outputs=8, prefix_caching=False)
    bench.add("old", 4, max_tokens=100)
    young = bench.add("young", 30, max_tokens=40)
    bench.step()
    taken = bench.blocks.allocate(bench.blocks.num_available)
    while young.phase is Phase.RUNNING:
        bench.step()
    bench.blocks.unpin(taken)
    known = len(young.tokens)
    assert known > 30
    computed = []
    while sum(computed) < known:
        planned = bench.step() or {}
        assert planned["old"] == 1
        computed.append(planned["young"])
    assert max(computed) == 8


def test_equal_prompts_are_computed_one_after_the_other() -> None:
    bench = Bench()
    bench.add("a", 40)
    bench.add("b", 40)
    assert [bench.step() for _ in range(3)] == [{"a": 16}, {"a": 16}, {"a": 8, "b": 8}]


def test_a_request_whose_prefix_is_being_computed_waits_for_it() -> None:
    bench = Bench(max_num_batched_tokens=8)
    shared = list(range(100, 124))
    bench.add("a", [*shared, 1], max_tokens=4)
    bench.add("b", [*shared, 2], max_tokens=4)
    bench.add("c", [9, 9, 9], max_tokens=4)
    seen = [bench.step() or {} for _ in range(8)]
    assert "c" in seen[1], "others overtake"
    assert sum(step.get("a", 0) for step in seen) >= 25
    assert next(step["b"] for step in seen if "b" in step) == 1, "b finds its prefix in pages and computes its last token"


def test_a_cached_prefix_is_not_computed_again() -> None:
    bench = Bench()
    prompt = list(range(50, 63))
    bench.add("a", prompt, max_tokens=1)
    assert bench.step() == {"a": 13}
    live = bench.add("b", prompt, max_tokens=1)
    assert bench.step() == {"b": 1}
    assert live.cached is not None
    assert live.cached.pages == 12


def test_the_last_prompt_token_is_always_computed() -> None:
    bench = Bench()
    prompt = list(range(50, 62))  # three full blocks
    bench.add("a", prompt, max_tokens=1)
    bench.step()
    live = bench.add("b", prompt, max_tokens=1)
    assert bench.step() == {"b": 4}
    assert live.cached is not None
    assert live.cached.total == 8


@pytest.mark.parametrize(("start", "reused"), [(0, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (40, 12)])
def test_reuse_stops_before_the_first_scored_position(start: int, reused: int) -> None:
    bench = Bench()
    prompt = list(range(50, 64))
    bench.add("a", prompt, max_tokens=1)
    bench.step()
    bench.add("b", prompt, max_tokens=1, sampling=SamplingSettings(num_prompt_logprobs=0, prompt_logprobs_start=start))
    assert bench.step() == {"b": len(prompt) - reused}


def test_without_prefix_caching_everything_is_computed() -> None:
    bench = Bench(prefix_caching=False)
    for name in ("a", "b"):
        bench.add(name, list(range(50, 62)), max_tokens=1)
    assert bench.step() == {"a": 12, "b": 4}


# Overlap: plan n + 1 before the result of n


def test_two_steps_run_ahead_of_the_results() -> None:
    bench = Bench()
    live = bench.add("a", 5, max_tokens=10)
    assert [bench.plan(), bench.plan()] == [{"a": 5}, {"a": 1}]
    assert (live.num_known, live.num_computed, live.num_confirmed, len(live.tokens)) == (7, 6, 0, 5)
    bench.apply()
    assert (live.num_confirmed, len(live.tokens)) == (5, 6)


def test_nothing_is_planned_past_max_tokens() -> None:
    bench = Bench()
    bench.add("a", 5, max_tokens=2)
    assert [bench.plan(), bench.plan(), bench.plan()] == [{"a": 5}, {"a": 1}, None]
    bench.apply()
    assert [live.request.request_id for live in bench.apply()] == ["a"]


def test_nothing_is_planned_past_the_context() -> None:
    bench = Bench(max_model_len=8)
    live = bench.add("a", 5, max_tokens=100)
    assert [bench.step() for _ in range(4)] == [{"a": 5}, {"a": 1}, {"a": 1}, None]
    assert len(live.tokens) == 8


def test_a_late_end_costs_one_trimmed_row() -> None:
    bench = Bench()
    live = bench.add("a", 5, max_tokens=10, end_token_ids=frozenset({77}))
    bench.plan()
    bench.plan()
    assert bench.apply(token=77) == [live]
    assert bench.apply(token=78) == []
    assert live.num_outputs == 1
    assert bench.plan() is None
    assert bench.blocks.num_used == bench.blocks.num_deferred == 0


def test_pages_of_an_ended_row_wait_for_the_step_that_names_them() -> None:
    bench = Bench(num_pages=4)
    bench.add("a", 9, max_tokens=10, end_token_ids=frozenset({77}))
    bench.add("b", 9)
    bench.plan()
    bench.plan()
    bench.apply(token=77)
    assert bench.blocks.num_deferred == 3
    assert bench.plan() is None, "the pages are not to be had yet"
    bench.apply()
    assert bench.plan() == {"b": 9}
    assert bench.launched[0].plan.rows_out == [1]


def test_a_block_is_published_with_the_result_that_completes_it() -> None:
    bench = Bench()
    live = bench.add("a", 6, max_tokens=8)
    bench.plan()
    bench.plan()
    assert bench.blocks.published() == []
    bench.apply()
    assert [block.depth for block in bench.blocks.published()] == [0]
    for _ in range(2):
        bench.plan()
        bench.apply()
    assert [block.key for block in bench.blocks.published()] == live.keys[:2]


def test_an_empty_plan_goes_out_only_for_copies() -> None:
    bench = Bench()
    assert bench.scheduler.plan() is None
    copy = BlockCopy(1, 1, 0, 0, 0.0, b"")
    launched = bench.scheduler.plan(saves=[copy])
    assert launched is not None
    assert launched.plan == StepPlan(1, [], [], [], [], [copy])


# Preemption


def crowded() -> Bench:
    """Two requests that fill a pool of 8 pages, and will want more."""
    bench = Bench(num_pages=9)
    bench.add("old", 15, max_tokens=12)
    bench.add("young", 11, max_tokens=12)
    bench.step()
    bench.step()
    return bench


def test_the_latest_arrival_is_preempted_and_comes_back_as_a_new_row() -> None:
    bench = crowded()
    young = bench.scheduler.running[1]
    first_row, steps = young.row_id, 0
    while not bench.scheduler.num_preemptions:
        bench.step()
        steps += 1
        assert steps < 20
    assert young.phase is Phase.PREEMPTED
    assert bench.scheduler.waiting[0] is young
    tokens = list(young.tokens)
    while young.phase is not Phase.RUNNING:
        bench.plan()
        if bench.launched[0].admitted:
            (row,) = bench.launched[0].plan.rows_in
            assert row.row_id != first_row
            assert array("I", row.token_ids).tolist() == tokens
            assert row.num_prompt_tokens == 11
        bench.apply()
    while bench.step():
        pass
    assert young.num_outputs == 12
    assert bench.blocks.num_used == 0


def test_a_preempted_rows_token_in_flight_counts() -> None:
    bench = Bench(num_pages=7)
    old = bench.add("old", 12, max_tokens=12)
    bench.add("young", 4, max_tokens=12)
    young = bench.scheduler.waiting[1]
    while not bench.scheduler.num_preemptions:
        while len(bench.launched) < 2 and bench.plan() is not None:
            pass
        if not bench.scheduler.num_preemptions:
            bench.apply()
    in_flight, known = young.num_in_flight, young.num_outputs
    assert in_flight > 0
    assert bench.plan() is None or young.phase is Phase.PREEMPTED, "it must not come back before its results"
    while young.num_in_flight:
        bench.apply()
    assert young.num_outputs == known + in_flight
    while bench.launched:
        bench.apply()
    while bench.step():
        pass
    assert (old.num_outputs, young.num_outputs) == (12, 12)


def test_a_row_waits_for_deferred_pages_rather_than_preempt() -> None:
    bench = Bench(num_pages=7)
    bench.add("a", 11, max_tokens=12)
    ending = bench.add("b", 5, max_tokens=12, end_token_ids=frozenset({77}))
    bench.plan()
    elsewhere = bench.blocks.allocate(1)  # no page is left
    assert bench.plan() == {"a": 1, "b": 1}
    bench.apply(token=77)  # both get 77, only b ends
    assert ending.phase is Phase.FINISHED
    assert bench.blocks.num_deferred == 2
    assert bench.plan() is None, "a's next position needs a page, and b's come back with the step that is under way"
    bench.apply()
    assert bench.plan() == {"a": 1}
    assert bench.scheduler.num_preemptions == 0
    bench.blocks.unpin(elsewhere)


def test_pages_held_for_waiting_requests_are_given_up_before_rows_are_preempted() -> None:
    bench = Bench(num_pages=6)
    bench.add("seed", list(range(8)), max_tokens=1)
    bench.step()
    bench.add("a", 11, max_tokens=8)
    bench.step()
    waiting = bench.add("waits", [*range(8), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], max_tokens=2)
    waiting.held_pages = bench.blocks.pin_published(waiting.extend_keys(BLOCK_SIZE)[:2])
    for _ in range(6):
        bench.step()
    assert waiting.held_pages == []
    assert bench.scheduler.num_preemptions == 0


def test_requests_that_wait_for_the_store_are_overtaken_but_not_for_lack_of_room() -> None:
    bench = Bench()
    first = bench.add("first", 4)
    bench.add("second", 4)
    first.load_gate = LoadGate.WAIT
    assert bench.step() == {"second": 4}
    bench.add("third", 4)
    first.load_gate = LoadGate.NO_ROOM
    assert bench.step() == {"second": 1}
    first.load_gate = LoadGate.OPEN
    assert bench.step() == {"second": 1, "first": 4, "third": 4}


def test_queued_tokens_are_the_prompt_tokens_not_yet_computed() -> None:
    bench = Bench()
    bench.add("a", 40, max_tokens=3)
    bench.add("b", 10)
    assert bench.scheduler.num_queued_tokens == 50
    bench.step()
    assert bench.scheduler.num_queued_tokens == 34
    assert bench.step() == {"a": 12, "b": 4}
    assert bench.scheduler.num_queued_tokens == 18
    while bench.scheduler.num_queued_tokens:
        bench.step()
    while bench.step():
        assert bench.scheduler.num_queued_tokens == 0


def test_removing_a_waiting_request_gives_back_what_it_holds() -> None:
    bench = Bench()
    bench.add("seed", list(range(8)), max_tokens=1)
    bench.step()
    waiting = bench.add("w", list(range(9)))
    waiting.held_pages = bench.blocks.pin_published(waiting.extend_keys(BLOCK_SIZE)[:2])
    bench.scheduler.remove(waiting)
    assert bench.blocks.num_used == 0
    assert bench.scheduler.num_queued_tokens == 0


def test_a_resumed_request_counts_its_old_tokens() -> None:
    bench = Bench()
    live = bench.add("a", [1, 2, 3], max_tokens=4, output=array("I", [8, 9]))
    bench.plan()
    assert bench.launched[0].plan.rows_in[0].num_prompt_tokens == 3
    bench.apply()
    bench.step()
    assert live.num_outputs == 4
    assert live.phase is Phase.FINISHED


def test_prompts_that_wait_may_take_more_beside_outputs() -> None:
    bench = prompt_bench(max_prompt_tokens_beside_outputs=100)
    bench.add("running", 4, max_tokens=50)
    bench.step()
    for number in range(4):
        bench.add(f"long {number}", 8000)
    assert sum((bench.step() or {}).values()) == 1792, "1 + 4 * 8000 / BACKLOG_STEPS, less what would be padded"


def test_a_backlog_is_drained_in_steps_of_nearly_one_size() -> None:
    """Rather than in ever smaller ones. The next prompts begin small again."""
    bench = prompt_bench(max_prompt_tokens_beside_outputs=128)
    bench.add("running", 4, max_tokens=500)
    bench.step()
    for number in range(64):
        bench.add(f"prompt {number}", 500, max_tokens=1)
    sizes = []
    while bench.scheduler.waiting:
        sizes.append(sum((bench.step() or {}).values()))
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sizes[0] == 1792
    assert min(sizes[:-1]) >= 1024, "a sixteenth of what was left would have been 128 tokens in the end"
    assert len(sizes) == 20, "not 67"
    bench.step()
    for number in range(3):
        bench.add(f"late {number}", 500, max_tokens=1)
    assert sum((bench.step() or {}).values()) == 128
