"""The replica's rate of prefill: from steps that did mostly that, and no others."""

import pytest

from runtime.engine.prefill_rate import PrefillRate
from workers.step import StepPlan, StepRow


def plan(*counts: int) -> StepPlan:
    return StepPlan(1, [], [], [StepRow(number, count, 0, 0, []) for number, count in enumerate(counts)], [], [])


def test_steps_of_prefill_count_and_decode_does_not() -> None:
    rate = PrefillRate()
    rate.note(plan(1, 1, 1), 0.0, 1.0)
    rate.note(plan(20, 1), 1.0, 2.0)
    assert rate.tokens_per_s == 0.0
    rate.note(plan(1000, 1), 2.0, 2.5)
    assert rate.tokens_per_s == pytest.approx(2000)
    rate.note(plan(100, *[1] * 60), 2.5, 9.0)
    assert rate.tokens_per_s == pytest.approx(2000)
    rate.note(plan(1000), 9.0, 10.0)
    assert rate.tokens_per_s == pytest.approx(0.8 * 2000 + 0.2 * 1000)


def test_a_step_launched_early_runs_from_the_end_of_the_one_before() -> None:
    rate = PrefillRate()
    rate.note(plan(1), 0.0, 5.0)
    rate.note(plan(1000), 0.5, 6.0)
    assert rate.tokens_per_s == pytest.approx(1000)
    rate.note(plan(1000), 0.6, 6.0)  # no time between: nothing to learn
    assert rate.tokens_per_s == pytest.approx(1000)
