"""What this replica computes and copies in a second: the store weighs its tiers against the one, with the other."""

from __future__ import annotations

from workers.step import StepPlan

MIN_TOKENS = 64  # of a step's prompt tokens; below, a step's time is that of its decoding
MIN_COPY_BYTES = 32 << 20  # of a stretch; below, its time is that of the steps it waited for
WEIGHT = 0.2  # of the newest measurement


class ReplicaRates:
    """Written by the engine's thread, read from any. Exponentially weighted; 0 while nothing is known."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0  # of prefill, over steps that did mostly that
        self.copy_bytes_per_s = 0.0  # from the arena into pages, over stretches in which some copy was under way
        self._last_end_s = 0.0
        self._num_open = 0
        self._begun_s = 0.0
        self._copied_bytes = 0

    def step_done(self, plan: StepPlan, launched_s: float, now_s: float) -> None:
        """It ran from its launch, or from the end of the step before it; one that waited for loads tells nothing."""
        begun_s = max(launched_s, self._last_end_s)
        self._last_end_s = now_s
        num_prompt_tokens = sum(row.num_query_tokens for row in plan.rows if row.num_query_tokens > 1)
        if num_prompt_tokens >= max(MIN_TOKENS, 4 * len(plan.rows)) and now_s > begun_s and not plan.waits:
            self.tokens_per_s = _moved(self.tokens_per_s, num_prompt_tokens / (now_s - begun_s))

    def copies_sent(self, num_copies: int, now_s: float) -> None:
        """Loads went out with a plan."""
        if not self._num_open:
            self._begun_s, self._copied_bytes = now_s, 0
        self._num_open += num_copies

    def copy_done(self, num_bytes: int, now_s: float) -> None:
        """One of them was answered; 0 bytes when it failed."""
        self._num_open -= 1
        self._copied_bytes += num_bytes
        if not self._num_open and self._copied_bytes >= MIN_COPY_BYTES and now_s > self._begun_s:
            self.copy_bytes_per_s = _moved(self.copy_bytes_per_s, self._copied_bytes / (now_s - self._begun_s))


def _moved(rate: float, measured: float) -> float:
    return (1 - WEIGHT) * rate + WEIGHT * measured if rate else measured
