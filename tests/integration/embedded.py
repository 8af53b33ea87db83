"""The embedded models, text that they have never seen, and transformers' opinion of it."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from deploy.demo.corpus import BOS, HELD_OUT_MODULES
from runtime.config import EMBEDDED_MODELS
from runtime.text.tokenizer import Tokenizer

NAMES = ("gqa", "mla")
_CHUNK = 1024


def folder(name: str) -> Path:
    return EMBEDDED_MODELS / name


@functools.cache
def oracle(name: str, dtype: str = "float32") -> Any:
    import torch

    from deploy.demo.evaluate import load_model

    return load_model(folder(name), getattr(torch, dtype), torch.device("cpu"))


@functools.cache
def tokenizer() -> Tokenizer:
    """Both models have the same one."""
    loaded = Tokenizer.load(folder("gqa"))
    assert loaded is not None
    return loaded


@functools.cache
def held_out(module: str) -> tuple[int, ...]:
    """A module of this Python's standard library that neither training nor tokenizer have seen."""
    assert module in HELD_OUT_MODULES
    text = (Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py").read_text(encoding="utf-8")
    return tuple(tokenizer().encode(BOS + text, add_special_tokens=False))


def log_softmax(name: str, tokens: list[int] | tuple[int, ...], dtype: str = "float32", *, last: int = 0) -> np.ndarray:
    """[tokens, vocabulary] by transformers, in float32 from logits in `dtype`; of the `last` positions only, unless 0.

    Long ones in chunks: transformers computes attention with unequal head sizes as one full matrix.
    """
    import torch

    cache, logits = None, []
    with torch.no_grad():
        for start in range(0, len(tokens), _CHUNK):
            output = oracle(name, dtype)(torch.tensor([tokens[start : start + _CHUNK]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[0].float())
    return np.asarray(torch.cat(logits)[-last:].log_softmax(-1))


def nlls(name: str, tokens: list[int] | tuple[int, ...], dtype: str = "float32", *, last: int = 0) -> np.ndarray:
    """Negative log-likelihood of each token but the first, or of the `last` ones, by transformers."""
    count = last or len(tokens) - 1
    scores = log_softmax(name, tokens, dtype, last=count + 1)[:-1]
    targets = np.array(tokens[-count:])
    return np.asarray(-scores[np.arange(count), targets])


def assert_greedy(name: str, prompt: list[int], token_ids: list[int]) -> None:
    """`token_ids` are what transformers would choose, one after the other."""
    scores = log_softmax(name, [*prompt, *token_ids[:-1]], last=len(token_ids))
    assert token_ids == scores.argmax(-1).tolist()
