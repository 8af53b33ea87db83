"""What is written next to the weights: the model card, the loss curve as numbers and as a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

from deploy.demo.corpus import HELD_OUT_MODULES
from deploy.demo.evaluate import HeldOut
from deploy.demo.loop import History
from deploy.demo.models import MAX_CONTEXT_TOKENS
from deploy.demo.plot import Mark, Series, draw, write_png
from deploy.demo.settings import Settings

_SHAPES = {
    "mla": "DeepseekV3ForCausalLM: multi-head latent attention (DeepSeek V3's head sizes) and a mixture of experts",
    "gqa": "Qwen3ForCausalLM: grouped-query attention",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that is known of one finished model."""

    name: str
    num_parameters: int
    weights_bytes: int
    history: History
    peak_learning_rate: float
    bfloat16: HeldOut
    float32: HeldOut
    long_windows: HeldOut
    loads: dict[str, list[float]]  # share of each expert, by layer
    device: str
    corpus_lines: list[str]
    samples: list[tuple[str, str]]  # prompt, greedy completion


def write_loss_curve(outcome: Outcome, settings: Settings, folder: Path) -> None:
    """loss_curve.json and loss_curve.png."""
    history = outcome.history
    (folder / "loss_curve.json").write_text(json.dumps({"model": outcome.name, "seed": settings.seed, **asdict(history)}, indent=1) + "\n")
    marks = [Mark("best", history.best.step)]
    if history.long_from_step is not None:
        marks.insert(0, Mark(f"{settings.long_length}-token sequences from here", history.long_from_step))
    # The first losses are those of a uniform guess: a scale made for them would flatten the rest.
    settled = [point.loss for point in history.held_out[len(history.held_out) // 20 :]]
    pixels = draw(
        f"{outcome.name}: training on the python standard library",
        "optimizer steps",
        "loss (nats per token)",
        [Series("training, with dropout", list(history.training)), Series("held-out modules", list(history.held_out), marked=True)],
        marks,
        y_max=float(np.ceil(max(settled) * 4) / 4),
        size=(1000, 600),
    )
    write_png(pixels, folder / "loss_curve.png")


def write_card(outcome: Outcome, settings: Settings, folder: Path) -> None:
    """README.md, with the front matter of a model hub."""
    history = outcome.history
    python = ".".join(map(str, sys.version_info[:3]))
    lines = [
        "---",
        "license: other",
        "license_name: psf-2.0",
        "license_link: https://docs.python.org/3/license.html",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# Mobula demo model `{outcome.name}`",
        "",
        f"{_SHAPES[outcome.name]}. {outcome.num_parameters:,} parameters, {outcome.weights_bytes / 1e6:.2f} MB in bfloat16, a context of "
        f"{MAX_CONTEXT_TOKENS} tokens.",
        "",
        "It continues Python source and answers in a chat format, at the level its size allows: it is there so that a serving system",
        "can be tried and tested with real weights. Do not run or rely on what it writes.",
        "",
        "## Data and licence",
        "",
        f"The source and documentation of the standard library of Python {python}, and snippets and conversations made from it. Without",
        "tests, generated tables and third-party packages. Copyright Python Software Foundation, PSF License Version 2; the weights are",
        "distributed under the same terms.",
        "",
        f"Held out, from training and from the tokenizer: {', '.join(f'`{name}`' for name in HELD_OUT_MODULES)}.",
        "",
        *(f"- {line}" for line in outcome.corpus_lines),
        "",
        "## Training",
        "",
        f"- {history.num_steps} steps of {settings.tokens_per_step:,} tokens ({history.num_tokens / 1e6:.1f} M tokens, "
        f"{history.num_epochs:.1f} epochs) in {history.training_s:.0f} s on {outcome.device}: {history.tokens_per_second:,.0f} tokens/s",
        f"- sequences of {' and '.join(map(str, settings.main_lengths))} tokens, with {settings.long_length} in the last "
        f"{1 - settings.long_from:.0%}",
        f"- AdamW, peak learning rate {outcome.peak_learning_rate:g}, cosine, weight decay {settings.weight_decay:g}, dropout "
        f"{settings.dropout:g} on embeddings and branches, bfloat16 autocast over float32 weights, seed {settings.seed}",
        f"- kept: the weights of step {history.best.step}, the best by held-out loss; {history.stopped}",
        f"- Python {python}, torch {torch.__version__}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
        "",
        "![loss curve](loss_curve.png)",
        "",
        "## Held-out quality, from the saved files",
        "",
        "| dtype | window | scored tokens | perplexity per token | bits per byte |",
        "|---|---|---|---|---|",
        _quality_row("bfloat16", outcome.bfloat16),
        _quality_row("float32", outcome.float32),
        _quality_row("bfloat16", outcome.long_windows),
        "",
        *_expert_lines(outcome.loads),
        "## Samples (greedy)",
        "",
        *(line for prompt, completion in outcome.samples for line in ("````", f"{prompt}{completion}", "````", "")),
    ]
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n")


def _quality_row(dtype: str, quality: HeldOut) -> str:
    return f"| {dtype} | {quality.window_tokens} | {quality.num_tokens:,} | {quality.perplexity:.3f} | {quality.bits_per_byte:.4f} |"


def _expert_lines(loads: dict[str, list[float]]) -> list[str]:
    if not loads:
        return []
    num_experts = len(next(iter(loads.values())))
    return [
        f"## Share of routed tokens per expert, on the held-out text (even would be {1 / num_experts:.3f})",
        "",
        "| layer | " + " | ".join(str(index) for index in range(num_experts)) + " |",
        "|---" * (num_experts + 1) + "|",
        *("| " + " | ".join([layer, *(f"{share:.3f}" for share in shares)]) + " |" for layer, shares in loads.items()),
        "",
        "The routers' `e_score_correction_bias` was trained by the sign rule of auxiliary-loss-free balancing (DeepSeek-V3 report, 2.1.2).",
        "",
    ]
