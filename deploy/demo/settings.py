"""What a training run is told: sizes, shares, lengths. FULL is for one data-centre GPU, TINY for a test of seconds on a CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_TOTAL_BYTES = 18_000_000  # both models' weights in bfloat16: they are part of the package


@dataclass(frozen=True, slots=True)
class Settings:
    tiny: bool = False
    seed: int = 0
    minutes: float = 5.0  # per model
    num_steps: int | None = None  # None: the clock decides
    max_epochs: float = 60.0  # the corpus is small: more passes only overfit
    vocab_size: int = 5120
    max_files: int | None = None
    chat_share: float = 0.18
    snippet_share: float = 0.06
    tokens_per_step: int = 32_768
    main_lengths: tuple[int, ...] = (1024, 2048)
    long_length: int = 8192  # in half of the steps of the last part
    long_from: float = 0.8  # share of training
    eval_length: int = 2048
    max_eval_windows: int | None = None
    num_evals: int = 40
    patience_evals: int = 16  # stop when the held-out loss has not improved for so long
    num_settling_steps: int = 5  # at the first, small learning rates, before the clock starts: kernels are chosen and built here
    warmup_share: float = 0.02
    final_rate_share: float = 0.02
    weight_decay: float = 0.1
    dropout: float = 0.1
    max_grad_norm: float = 1.0
    peak_learning_rate: float | None = None  # None: the model's own
    compile: bool = False
    num_sample_tokens: int = 160

    def learning_rate(self, peak: float, progress: float) -> float:
        """Linear warm-up, then a cosine down to final_rate_share of the peak; progress runs from 0 to 1."""
        if progress < self.warmup_share:
            return peak * max(progress / self.warmup_share, 0.01)
        done = (progress - self.warmup_share) / (1 - self.warmup_share)
        return peak * (self.final_rate_share + (1 - self.final_rate_share) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


FULL = Settings()
TINY = Settings(
    tiny=True,
    num_steps=24,
    vocab_size=600,
    max_files=12,
    tokens_per_step=512,
    main_lengths=(64, 128),
    long_length=256,
    eval_length=128,
    max_eval_windows=8,
    num_evals=4,
    num_settling_steps=1,
    peak_learning_rate=3e-3,
    num_sample_tokens=8,
)
