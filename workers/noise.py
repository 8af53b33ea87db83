"""Random bits as a pure function of integers: the same on every device, for any slice, in any order.

Everything is int32 arithmetic modulo 2**32, which torch does alike on the CPU and on CUDA. The mixing function is the two-round
xorshift-multiply hash "lowbias32" (Chris Wellons, hash-prospector, public domain).
"""

from __future__ import annotations

import torch

_FACTORS = (0x7FEB352D, 0x846CA68B)


def _signed(value: int) -> int:
    """The int32 with the same bits as the low 32 bits of `value`."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def mix_(x: torch.Tensor) -> torch.Tensor:
    """Hashes every int32 of `x` in place; a bijection of 32-bit values."""
    for factor, shift in zip(_FACTORS, (16, 15), strict=True):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))  # int32 shifts drag the sign along: mask it off
        x.mul_(_signed(factor))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def mix_int(value: int) -> int:
    """`mix_` of one value, as an unsigned integer."""
    value &= 0xFFFFFFFF
    for factor, shift in zip(_FACTORS, (16, 15), strict=True):
        value ^= value >> shift
        value = value * factor & 0xFFFFFFFF
    return value ^ value >> 16


def split_seed(seed: int) -> tuple[int, int]:
    """An unsigned 64-bit seed as two int32 words, low and high."""
    return _signed(seed), _signed(seed >> 32)


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise in float32 from int32 bits, with u = (bits + 1/2) / 2**32 as if in full precision.

    -log(-log(u)) needs u near 0 and 1 - u near 0 to 32 bits, and float32 has them only near 0; so above one half -log1p(u - 1) is used.
    """
    distance = (bits ^ (bits >> 31)).float().add_(0.5).mul_(2.0**-32)  # to the nearer end of (0, 1)
    exponential = torch.where(bits >= 0, distance.log(), torch.log1p(-distance)).neg_()
    return exponential.log_().neg_()


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """Float32 in (-1, 1), symmetric, from int32 bits."""
    return bits.float().add_(0.5).mul_(2.0**-31)
