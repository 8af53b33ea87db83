"""The training loop of one model: mixed sequence lengths, a clock for a schedule, the best weights by held-out loss.

Shape suffixes: B sequences, L tokens of a sequence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deploy.demo.evaluate import held_out_loss
from deploy.demo.models import ExpertBalancer, bias_step, compiled_layers, training_extras
from deploy.demo.packing import PackedStream, Tokens
from deploy.demo.progress import Limits, Report, Stopwatch
from deploy.demo.settings import Settings


class Point(NamedTuple):
    step: int
    loss: float  # nats per token


@dataclass(slots=True)
class History:
    """What the loss curve and the model card tell of a run."""

    training: list[Point] = field(default_factory=list)  # means over the steps since the point before
    held_out: list[Point] = field(default_factory=list)
    best: Point = field(default_factory=lambda: Point(0, math.inf))
    long_from_step: int | None = None
    num_steps: int = 0
    num_tokens: int = 0
    num_timed_tokens: int = 0  # without the settling steps
    num_epochs: float = 0.0
    training_s: float = 0.0  # of the timed steps alone
    stopped: str = "schedule finished"

    @property
    def tokens_per_second(self) -> float:
        return self.num_timed_tokens / max(self.training_s, 1e-9)


def make_optimizer(model: PreTrainedModel, settings: Settings, device: torch.device) -> torch.optim.AdamW:
    """Weight decay on matrices, not on norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")


class Trainer:
    """Owns the optimizer and the history of one run; run() leaves the best weights in the model, in float32."""

    def __init__(
        self,
        model: PreTrainedModel,
        stream: PackedStream,
        held_out_BL: Tokens,
        bytes_of_token: list[int],
        settings: Settings,
        peak_learning_rate: float,
        report: Report,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self._stream = stream
        self.held_out_BL = held_out_BL
        self._bytes_of_token = bytes_of_token
        self._settings = settings
        self._peak_learning_rate = peak_learning_rate
        self._report = report
        self._clock = clock
        self._device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, settings, self._device)
        self._lengths = np.random.default_rng(settings.seed + 1)
        self._best: dict[str, Tensor] = {}
        self.history = History()

    def run(self) -> History:
        """Raises FloatingPointError when the loss is no longer finite."""
        settings = self._settings
        limits = Limits(settings.num_steps, settings.minutes * 60, settings.max_epochs * self._stream.epoch_tokens)
        balancer = ExpertBalancer(self.model)
        try:
            with training_extras(self.model, settings.dropout), compiled_layers(self.model, settings.compile):
                self._loop(limits, balancer)
        finally:
            balancer.close()
        self.model.load_state_dict(self._best)
        return self.history

    def _loop(self, limits: Limits, balancer: ExpertBalancer) -> None:
        history, settings = self.history, self._settings
        watch = Stopwatch(self._clock)
        unreported: list[Tensor] = []
        progress, next_eval, settling_tokens = 0.0, 1 / settings.num_evals, 0
        while progress < 1:
            self.model.train()
            length = self._next_length(progress)
            unreported.append(self._step(length, progress))
            balancer.update(bias_step(progress))
            history.num_steps += 1
            if history.num_steps <= settings.num_settling_steps:
                self._synchronize()
                watch.start()
                settling_tokens = history.num_tokens
            history.num_timed_tokens = history.num_tokens - settling_tokens
            progress = limits.progress(history.num_steps, watch.elapsed_s(), history.num_tokens)
            if progress >= next_eval or progress >= 1:
                self._synchronize()
                history.training_s = watch.elapsed_s()
                with watch.paused():
                    self._evaluate(unreported, progress)
                unreported = []
                next_eval = (math.floor(progress * settings.num_evals + 1e-9) + 1) / settings.num_evals
                if self._is_overfitting():
                    history.stopped = f"no better held-out loss in {settings.patience_evals} evaluations"
                    break
            elif len(unreported) == 20:
                self._note_training_loss(unreported)
                unreported = []
        history.num_epochs = history.num_tokens / self._stream.epoch_tokens

    def _next_length(self, progress: float) -> int:
        """The last part mixes in long sequences, so that a prompt of thousands of tokens is nothing new."""
        settings = self._settings
        if progress < settings.long_from:
            return int(self._lengths.choice(settings.main_lengths))
        if self.history.long_from_step is None:
            self.history.long_from_step = self.history.num_steps
        return settings.long_length if self._lengths.random() < 0.5 else settings.main_lengths[-1]

    def _step(self, length: int, progress: float) -> Tensor:
        """One optimizer step on about tokens_per_step tokens; returns the loss, still on the device."""
        settings = self._settings
        tokens_BL = torch.from_numpy(self._stream.take(max(1, settings.tokens_per_step // length), length))
        self.history.num_tokens += tokens_BL.numel()
        if self._device.type == "cuda":
            tokens_BL = tokens_BL.pin_memory().to(self._device, non_blocking=True)
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            loss: Tensor = self.model(input_ids=tokens_BL, labels=tokens_BL, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate(self._peak_learning_rate, progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _note_training_loss(self, losses: list[Tensor]) -> None:
        loss = float(torch.stack(losses).float().mean())
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss} at step {self.history.num_steps}: lower --learning-rate")
        self.history.training.append(Point(self.history.num_steps, loss))

    def _evaluate(self, losses: list[Tensor], progress: float) -> None:
        history = self.history
        if losses:
            self._note_training_loss(losses)
        held_out = held_out_loss(self.model, self.held_out_BL, self._bytes_of_token, autocast=True)
        point = Point(history.num_steps, held_out.nats_per_token)
        if not math.isfinite(point.loss):
            raise FloatingPointError(f"the held-out loss is {point.loss} at step {point.step}: lower --learning-rate")
        history.held_out.append(point)
        if point.loss < history.best.loss:
            history.best = point
            self._best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        left_s = history.training_s * (1 - progress) / progress
        self._report(
            progress,
            f"step {history.num_steps}  loss {history.training[-1].loss:.3f}  held out {point.loss:.3f} "
            f"({held_out.bits_per_byte:.3f} bits/byte, best {history.best.loss:.3f})  "
            f"{history.tokens_per_second:,.0f} tok/s  {max(left_s, 0.0):.0f} s left",
        )

    def _is_overfitting(self) -> bool:
        history = self.history
        since_best = sum(1 for point in history.held_out if point.step > history.best.step)
        return since_best >= self._settings.patience_evals

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
