"""RMS norm with the residual addition before it, and the gated activation, one pass over memory each.

T tokens, H hidden, I intermediate
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ACTIVATION_BLOCK = 1024


@triton.jit
def _add_rms_norm(x_ptr, delta_ptr, weight_ptr, out_ptr, sum_ptr, size, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + start + columns, total, mask=inside)
        x = total.to(tl.float32)  # what is normed is what is stored
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps) * weight
    tl.store(out_ptr + start + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(
    x_TH: torch.Tensor, delta_TH: torch.Tensor | None, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + delta), x + delta), contiguous [T, H] each. Sums and squares in float32, rounded once."""
    size = x_TH.shape[-1]
    out_TH = torch.empty_like(x_TH)
    sum_TH = x_TH if delta_TH is None else torch.empty_like(x_TH)
    block = triton.next_power_of_2(size)
    _add_rms_norm[(x_TH.numel() // size,)](
        x_TH,
        x_TH if delta_TH is None else delta_TH,
        weight_H,
        out_TH,
        sum_TH,
        size,
        eps,
        HAS_DELTA=delta_TH is not None,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
    )
    return out_TH, sum_TH


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up_ptr + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up_TI: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of contiguous [T, gate | up]."""
    size = gate_up_TI.shape[1] // 2
    out_TI = gate_up_TI.new_empty((len(gate_up_TI), size))
    _silu_mul[(len(gate_up_TI), triton.cdiv(size, _ACTIVATION_BLOCK))](gate_up_TI, out_TI, size, BLOCK=_ACTIVATION_BLOCK, num_warps=4)
    return out_TI
