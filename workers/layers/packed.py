"""Matrices rearranged once for the kernels that multiply by them.

On the CPU for oneDNN's, which would else rearrange them inside every multiplication. Float32, 256 to 1024 wide, one thread: 4 rows take
1.1 ms where MKL takes 2.5, 16 rows 3.0 instead of 4.8, 512 rows 70 instead of 79; a single row 0.95 instead of 0.74.

T tokens, I inputs, O outputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

_ROWS_HINT = 16  # the number of rows that the arrangement is best for; it is good for all others


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the kernels: the ones that torch.compile uses for frozen weights."""
    return dtype == torch.float32 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Packed(nn.Module):
    """Something that is rearranged when its weights are there."""

    def pack(self) -> None:
        """To be called once the weights are loaded. Does nothing where there is nothing to gain."""
        raise NotImplementedError


class Matrix(Packed):
    """Something with a `weight` [O, I] that activations are multiplied by. After `pack` there is no plain weight any more."""

    weight: nn.Parameter | None
    _packed: torch.Tensor | None = None

    def multiply(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None = None, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[T, O]. `dtype`: that of the result, where the sum comes in a wider one anyway; else it is rounded first."""
        if self._packed is None:
            assert self.weight is not None
            if x_TI.is_cuda:
                from workers.kernels import linear

                if linear.can_multiply(x_TI, self.weight):
                    return linear.multiply(x_TI, self.weight, bias_O, dtype=dtype)
                if dtype is not None and bias_O is None:
                    return torch.mm(x_TI, self.weight.t(), out_dtype=dtype)
            product_TO = F.linear(x_TI, self.weight, bias_O)
            return product_TO if dtype is None else product_TO.to(dtype)
        assert dtype in (None, torch.float32), "only float32 is packed"
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, bias_O, "none", [], "")
        return product

    def pack(self) -> None:
        weight = self.weight
        if weight is not None and weight.device.type == "cpu" and weight.numel() and can_pack(weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.data.contiguous(), _ROWS_HINT)
            self.weight = None


def pack_matrices(model: nn.Module) -> None:
    """Packs all of a loaded model, one after the other: memory grows by the largest of them for a moment."""
    for module in model.modules():
        if isinstance(module, Packed):
            module.pack()
