"""How many prompt tokens a second this replica computes: what bringing blocks from another tier has to beat."""

from __future__ import annotations

from workers.step import StepPlan

MIN_TOKENS = 64  # of a step's prompt tokens; below, a step's time is that of its decoding
WEIGHT = 0.2  # of the newest step


class PrefillRate:
    """Written by the engine's thread, read from any. Exponentially weighted over steps that did mostly prefill."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0  # 0: not known yet
        self._last_end_s = 0.0

    def note(self, plan: StepPlan, launched_s: float, now_s: float) -> None:
        """A step has ended. It ran from its launch, or from the end of the step before it."""
        begun_s = max(launched_s, self._last_end_s)
        self._last_end_s = now_s
        num_prompt_tokens = sum(row.num_query_tokens for row in plan.rows if row.num_query_tokens > 1)
        if num_prompt_tokens < max(MIN_TOKENS, 4 * len(plan.rows)) or now_s <= begun_s:
            return
        rate = num_prompt_tokens / (now_s - begun_s)
        self.tokens_per_s = rate if not self.tokens_per_s else (1 - WEIGHT) * self.tokens_per_s + WEIGHT * rate
