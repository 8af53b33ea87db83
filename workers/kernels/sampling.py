"""Drawing tokens in one pass over the logits: temperature, the noise of `workers.noise`, and the largest.

S rows, V vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _mix(x):
    """`workers.noise.mix_` of uint32 values."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(bits):
    """`workers.noise.gumbel` of uint32 values. Near 0, log(1 - d) is its series: in float32, 1 - d would round to 1."""
    high = bits >> 31
    distance = ((bits ^ (0 - high)).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    d = distance
    series = -d * (1.0 + d * (0.5 + d * (0.33333334 + d * (0.25 + d * 0.2))))
    far = tl.where(d < 0.03, series, tl.log(1.0 - d))
    return -tl.log(-tl.where(high == 0, tl.log(d), far))


@triton.jit
def _draw(logits_ptr, temperature_ptr, keys_ptr, best_ptr, at_ptr, row_stride, vocab_size, num_blocks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    logits = tl.load(logits_ptr + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        first, second = tl.load(keys_ptr + 2 * row).to(tl.uint32, bitcast=True), tl.load(keys_ptr + 2 * row + 1).to(tl.uint32, bitcast=True)
        logits = logits / temperature + _gumbel(_mix(_mix(token.to(tl.uint32) ^ first) ^ second))
    tl.store(best_ptr + row * num_blocks + block, tl.max(logits, 0))
    at = tl.minimum(block * BLOCK + tl.argmax(logits, 0), vocab_size - 1)  # NaN, of a row that counts for nothing, loses against padding
    tl.store(at_ptr + row * num_blocks + block, at)


def draw(logits_SV: torch.Tensor, temperature_S: torch.Tensor, keys_S2: torch.Tensor) -> torch.Tensor:
    """Tokens [S] (int64). `keys_S2`: int32, each row's two keys of noise; temperature 0 takes the largest logit. Logits of tokens that must
    not be drawn are -inf."""
    num_rows, vocab_size = logits_SV.shape
    temperature_S, keys_S2 = temperature_S.contiguous(), keys_S2.contiguous()  # settings come as columns of a table
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    best = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits_SV.device)
    at = torch.empty((num_rows, num_blocks), dtype=torch.int64, device=logits_SV.device)
    _draw[(num_rows, num_blocks)](
        logits_SV, temperature_S, keys_S2, best, at, logits_SV.stride(0), vocab_size, num_blocks, BLOCK=_BLOCK, num_warps=8
    )
    return at.gather(1, best.argmax(-1, keepdim=True)).squeeze(1)
