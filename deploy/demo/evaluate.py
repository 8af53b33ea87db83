"""Held-out perplexity: `python -m deploy.demo.evaluate MODEL_DIR` measures a saved model on this Python's held-out modules.

Shape suffixes: B windows, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from deploy.demo.corpus import load_corpus
from deploy.demo.models import correction_biases
from deploy.demo.packing import Tokens, encode_corpus, windows
from deploy.demo.vocabulary import token_bytes

_LOGITS_BUDGET_BYTES = 1 << 30  # float32 logits of one forward pass


class HeldOut(NamedTuple):
    """Loss on text the model never saw. The first token of a window is not scored: it has no context."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int
    window_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def token_batches(tokens_BL: Tokens, vocab_size: int, device: torch.device) -> Iterator[Tensor]:
    """The windows on the device, as many at a time as their logits allow."""
    size = max(1, _LOGITS_BUDGET_BYTES // (tokens_BL.shape[1] * vocab_size * 4))
    for start in range(0, len(tokens_BL), size):
        yield torch.from_numpy(tokens_BL[start : start + size]).to(device)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens_BL: Tokens, bytes_of_token: list[int], autocast: bool) -> HeldOut:
    """Puts the model into evaluation mode and leaves it so. autocast: bfloat16 products, as in training."""
    model.eval()
    device = next(model.parameters()).device
    bytes_V = torch.tensor(bytes_of_token, device=device)
    total_nats = torch.zeros((), dtype=torch.float64, device=device)
    total_bytes = torch.zeros((), dtype=torch.int64, device=device)
    for batch_BL in token_batches(tokens_BL, len(bytes_of_token), device):
        with torch.autocast(device.type, dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            logits_BLV = model(input_ids=batch_BL, use_cache=False).logits
        targets = batch_BL[:, 1:].reshape(-1)
        losses = functional.cross_entropy(logits_BLV[:, :-1].float().reshape(len(targets), -1), targets, reduction="none")
        total_nats += losses.double().sum()
        total_bytes += bytes_V[targets].sum()
    num_tokens = tokens_BL.shape[0] * (tokens_BL.shape[1] - 1)
    nats = float(total_nats)
    return HeldOut(nats / num_tokens, nats / math.log(2) / int(total_bytes), num_tokens, tokens_BL.shape[1])


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A saved model, with transformers' plain loop over experts: its grouped kernels do not exist for every device and dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if correction_biases(model):
        model.set_experts_implementation("eager")
    return model.to(device).eval()


def evaluate_folder(folder: Path, tokens_BL: Tokens, bytes_of_token: list[int], dtype: torch.dtype, device: torch.device) -> HeldOut:
    """The same of a saved model, loaded as users load it. Raises ValueError when the loss is not finite."""
    result = held_out_loss(load_model(folder, dtype, device), tokens_BL, bytes_of_token, autocast=False)
    if not math.isfinite(result.nats_per_token):
        raise ValueError(f"{folder} in {dtype}: the held-out loss is {result.nats_per_token}; the checkpoint is broken, train it again")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out perplexity of a saved model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--window", type=int, default=2048, help="tokens of context (default 2048)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    held_out = encode_corpus(tokenizer, load_corpus(seed=0)).held_out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate_folder(args.folder, windows(held_out, args.window), token_bytes(tokenizer), getattr(torch, args.dtype), device)
    print(
        f"{result.num_tokens} tokens in windows of {args.window}: perplexity {result.perplexity:.3f} per token, "
        f"{result.nats_per_token:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte"
    )


if __name__ == "__main__":
    main()
