"""Rotary position embedding (arXiv 2104.09864) and its scaled kinds, with transformers' formulas.

P positions, T tokens, N heads, D dimensions of a head, R = D / 2 frequencies
"""

from __future__ import annotations

import math

import torch

from workers.models.rope import RopeConfig, yarn_mscale


class RotaryTable:
    """cos and sin of every position, [P, R] each, in the compute dtype; computed in float32."""

    def __init__(self, rope: RopeConfig, head_dim: int, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        frequencies_R, scale = inverse_frequencies(rope, head_dim)
        angles_PR = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies_R
        self._cos_PR = (angles_PR.cos() * scale).to(device, dtype)
        self._sin_PR = (angles_PR.sin() * scale).to(device, dtype)

    def at(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for the tokens of a step, [T, 1, R] each."""
        return self._cos_PR[positions_T].unsqueeze(1), self._sin_PR[positions_T].unsqueeze(1)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """The frequencies [R] in float32 and the factor on cos and sin."""
    plain_R = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    match rope.kind:
        case "linear":
            return plain_R / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, plain_R), 1.0
        case "yarn":
            return _yarn(rope, head_dim)
        case "longrope":
            return _longrope(rope, plain_R)
        case _:  # default; dynamic equals it up to the original context, where max_model_len ends
            return plain_R, 1.0


def _llama3(rope: RopeConfig, plain_R: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    original = rope.original_max_position_embeddings
    wavelength_R = 2 * math.pi / plain_R
    smooth_R = (original / wavelength_R - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between_R = (1 - smooth_R) * plain_R / rope.factor + smooth_R * plain_R
    stretched_R = torch.where(wavelength_R > original / rope.low_freq_factor, plain_R / rope.factor, between_R)
    return torch.where(wavelength_R < original / rope.high_freq_factor, plain_R, stretched_R)


def _yarn(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """arXiv 2309.00071, section 3.2: high frequencies kept, low ones stretched, a linear ramp between the two correction dimensions."""
    scale = rope.attention_factor
    if scale is None:
        if rope.mscale and rope.mscale_all_dim:
            scale = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
        else:
            scale = yarn_mscale(rope.factor)

    def correction_dim(num_rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers: keeps the ramp finite
    ramp_R = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers_R = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kept_R = 1 - ramp_R
    return 1.0 / (rope.factor * powers_R) * (1 - kept_R) + 1.0 / powers_R * kept_R, scale


def _longrope(rope: RopeConfig, plain_R: torch.Tensor) -> tuple[torch.Tensor, float]:
    """arXiv 2402.13753 with the short factors: contexts end at the original length."""
    scale = rope.attention_factor
    if scale is None:
        scale = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    return plain_R / torch.tensor(rope.short_factor, dtype=torch.float32), scale


def rotate_(x_TND: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor) -> None:
    """Rotates in place; the pairs are (i, i + D/2)."""
    first, second = x_TND.chunk(2, dim=-1)
    rotated = torch.addcmul(first * cos_T1R, second, sin_T1R, value=-1)
    second.copy_(torch.addcmul(second * cos_T1R, first, sin_T1R))
    first.copy_(rotated)


def rotate_pairs(x_TND: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (2i, 2i + 1) and returns them as halves: DeepSeek's weights, stored as everyone's bytes."""
    first, second = x_TND[..., 0::2], x_TND[..., 1::2]
    return torch.cat(
        (
            torch.addcmul(first * cos_T1R, second, sin_T1R, value=-1),
            torch.addcmul(second * cos_T1R, first, sin_T1R),
        ),
        dim=-1,
    )
