"""The replica's rates: of prefill from steps that did mostly that and no others, of copies while some are under way."""

import pytest

from runtime.engine.rates import MIN_COPY_BYTES, ReplicaRates
from workers.step import StepPlan, StepRow


def plan(*counts: int) -> StepPlan:
    return StepPlan(1, [], [], [StepRow(number, count, 0, 0, []) for number, count in enumerate(counts)], [], [])


def test_steps_of_prefill_count_and_decode_does_not() -> None:
    rate = ReplicaRates()
    rate.step_done(plan(1, 1, 1), 0.0, 1.0)
    rate.step_done(plan(20, 1), 1.0, 2.0)
    assert rate.tokens_per_s == 0.0
    rate.step_done(plan(1000, 1), 2.0, 2.5)
    assert rate.tokens_per_s == pytest.approx(2000)
    rate.step_done(plan(100, *[1] * 60), 2.5, 9.0)
    assert rate.tokens_per_s == pytest.approx(2000)
    rate.step_done(plan(1000), 9.0, 10.0)
    assert rate.tokens_per_s == pytest.approx(0.8 * 2000 + 0.2 * 1000)


def test_a_step_launched_early_runs_from_the_end_of_the_one_before() -> None:
    rate = ReplicaRates()
    rate.step_done(plan(1), 0.0, 5.0)
    rate.step_done(plan(1000), 0.5, 6.0)
    assert rate.tokens_per_s == pytest.approx(1000)
    rate.step_done(plan(1000), 0.6, 6.0)  # no time between: nothing to learn
    rate.step_done(plan(1000)._replace(waits=True), 6.0, 9.0)  # some of it was spent on loads
    assert rate.tokens_per_s == pytest.approx(1000)


def test_copies_count_from_the_first_sent_to_the_last_answered() -> None:
    rate = ReplicaRates()
    size = MIN_COPY_BYTES // 2
    rate.copies_sent(2, 1.0)
    rate.copy_done(size, 1.5)
    rate.copies_sent(1, 1.5)
    rate.copy_done(size, 2.0)
    assert rate.copy_bytes_per_s == 0.0
    rate.copy_done(0, 3.0)  # failed
    assert rate.copy_bytes_per_s == pytest.approx(size)
    rate.copies_sent(0, 4.0)
    rate.copies_sent(1, 5.0)
    rate.copy_done(6 * size, 6.0)
    assert rate.copy_bytes_per_s == pytest.approx(0.8 * size + 0.2 * 6 * size)
    rate.copies_sent(1, 7.0)
    rate.copy_done(1000, 8.0)  # too little to tell a rate from
    assert rate.copy_bytes_per_s == pytest.approx(2 * size)
