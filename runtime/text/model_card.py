"""What a front door needs to know of a model: read once from its folder, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runtime.text.chat import ChatTemplate, load_chat_template, read_json
from runtime.text.tokenizer import Tokenizer
from workers.errors import UnsupportedConfig
from workers.models.config import load_model_config


class SamplingDefaults(NamedTuple):
    """What a request that leaves a setting out gets. Values that change nothing, unless generation_config.json has others."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelCard:
    name: str
    architecture: str
    max_model_len: int  # tokens, prompt and output together
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as the front door serves it. Without a tokenizer only token ids are served."""

    card: ModelCard
    tokenizer: Tokenizer | None = None
    chat: ChatTemplate | None = None  # never without a tokenizer


def load_served_model(folder: str | Path, name: str = "", max_model_len: int | None = None) -> ServedModel:
    """CheckpointError for a folder that cannot be served. An empty `name` means that of the folder."""
    path = Path(folder)
    config = load_model_config(path)
    generation = read_json(path / "generation_config.json")
    card = ModelCard(
        name=name or path.resolve().name,
        architecture=config.architecture,
        max_model_len=min(config.max_model_len, max_model_len or config.max_model_len),
        vocab_size=config.vocab_size,
        eos_token_ids=_eos_token_ids(read_json(path / "config.json")) | _eos_token_ids(generation),
        defaults=_sampling_defaults(generation),
    )
    tokenizer = Tokenizer.load(path)
    return ServedModel(card, tokenizer, load_chat_template(path) if tokenizer else None)


def _eos_token_ids(config: Mapping[str, Any]) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise UnsupportedConfig(f"eos_token_id must be a token id or a list of token ids, not {value!r}")
    return frozenset(ids)


def _sampling_defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """The settings that generation_config.json states; top_k -1 means all tokens, as 0 does."""
    stated: dict[str, Any] = {}
    for name, neutral in SamplingDefaults()._asdict().items():
        value = generation.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UnsupportedConfig(f"generation_config.json: {name} must be a number, not {value!r}")
        stated[name] = max(0, int(value)) if isinstance(neutral, int) else float(value)
    return SamplingDefaults(**stated)
