"""Rotary settings of a config.json. Imports no torch.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from workers.models.fields import Fields

UNCAPPED_ROPES = ("default", "linear", "llama3", "yarn")
CAPPED_ROPES = ("dynamic", "longrope")  # a key's bytes depend on the length beyond the original context
SMALLEST_FACTOR = 1e-3  # frequencies are divided by factors; the ones in use are 1 or more
_NEED_FACTOR = ("linear", "llama3", "dynamic")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. Names as in transformers' rope_parameters; `layers.rotary` turns them into a table."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Attention temperature of YaRN (arXiv 2309.00071, section 3.4), as transformers' get_mscale."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_rope(config: Fields, rope_dim: int, dim_name: str) -> tuple[RopeConfig, int, tuple[str, ...]]:
    """The rope over `rope_dim` dimensions of a head (config's field `dim_name`), the longest context in tokens, and notes for the user.

    Keys that only some kinds use are read for all of them. UnsupportedConfig for what is not built.
    """
    max_positions = config.integer("max_position_embeddings", 2048)
    raw = config.nested("rope_scaling" if config.raw.get("rope_scaling") else "rope_parameters")
    if any(isinstance(value, dict) for value in raw.raw.values()):
        raise config.unsupported("rope_parameters", "rope settings per kind of layer are not built")
    kind = str(raw.raw.get("rope_type") or raw.raw.get("type") or "default")
    if kind not in (*UNCAPPED_ROPES, *CAPPED_ROPES):
        raise config.unsupported("rope type", f"{kind!r} is not built, only {', '.join((*UNCAPPED_ROPES, *CAPPED_ROPES))}")
    if (raw if raw.has("partial_rotary_factor") else config).number("partial_rotary_factor", 1.0) != 1.0:
        raise config.unsupported("partial_rotary_factor", "a rope over a part of the head is not built")
    if rope_dim % 2:
        raise config.unsupported(dim_name, f"a rope turns pairs of dimensions, and {rope_dim} is odd")
    outer = config.has("original_max_position_embeddings")
    original = (config if outer else raw).integer("original_max_position_embeddings", max_positions)
    if kind == "dynamic":
        original = max_positions  # transformers scales only beyond max_position_embeddings
    default_factor = {"yarn": max_positions / original, "longrope": max_positions / original}.get(kind, 1.0)
    rope = RopeConfig(
        kind=kind,
        theta=(raw if raw.has("rope_theta") else config).number("rope_theta", 10000.0, above=1),
        factor=raw.number("factor", None if kind in _NEED_FACTOR else default_factor, above=SMALLEST_FACTOR),
        original_max_position_embeddings=original,
        attention_factor=raw.number("attention_factor", above=0) if raw.has("attention_factor") else None,
        low_freq_factor=raw.number("low_freq_factor", None if kind == "llama3" else 1.0, above=0),
        high_freq_factor=raw.number("high_freq_factor", None if kind == "llama3" else 1.0, above=0),
        beta_fast=raw.number("beta_fast", 0.0) or 32.0,
        beta_slow=raw.number("beta_slow", 0.0) or 1.0,
        mscale=raw.number("mscale", 0.0, minimum=0),
        mscale_all_dim=raw.number("mscale_all_dim", 0.0, minimum=0),
        truncate=raw.flag("truncate", True),
        short_factor=raw.numbers("short_factor", above=SMALLEST_FACTOR),
    )
    _check(rope, raw, rope_dim)
    notes: tuple[str, ...] = ()
    if kind in CAPPED_ROPES and max_positions >= original:
        notes = (f"rope type {kind} is served up to its original context of {original} tokens",)
        max_positions = original
    return rope, max_positions, notes


def _check(rope: RopeConfig, raw: Fields, rope_dim: int) -> None:
    """Settings whose formula would divide by zero or not fit the head."""
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise raw.wrong("high_freq_factor", f"above low_freq_factor {rope.low_freq_factor:g}")
    if rope.kind == "longrope" and len(rope.short_factor) != rope_dim // 2:
        raise raw.wrong("short_factor", f"a list of {rope_dim // 2} numbers, one per pair of rotated dimensions")
    if rope.kind == "longrope" and rope.original_max_position_embeddings < 2:
        raise raw.unsupported("original_max_position_embeddings", "longrope divides by its logarithm: it must be at least 2")
    if rope.kind == "yarn" and (rope.beta_fast <= 0 or rope.beta_slow <= 0):
        raise raw.unsupported("beta_fast", "yarn needs betas above 0")
