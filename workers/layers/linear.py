"""Linear layers, whole or split over the ranks of a group.

T tokens, I inputs, O outputs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.layers.packed import Matrix
from workers.layers.parameter import Part, Placement, Share


class ColumnLinear(Matrix):
    """One or more projections of the same input, kept as one weight [sum of shares, I]. No communication: with whole shares it is a
    replicated layer, with split shares each rank computes its own outputs."""

    def __init__(
        self, placement: Placement, num_inputs: int, shares: Sequence[Share], *, bias: Sequence[bool] | bool = False, plain: bool = False
    ) -> None:
        """`plain`: somebody else looks at the weight too, so it is never packed."""
        super().__init__()
        self.sizes = [share.size for share in shares]
        num_outputs = sum(self.sizes)
        has_bias = [bias] * len(shares) if isinstance(bias, bool) else list(bias)
        matrix_parts, bias_parts = [], []
        start = 0
        for share, biased in zip(shares, has_bias, strict=True):
            source, target = slice(share.start, share.stop), slice(start, start + share.size)
            matrix_parts.append(Part((share.total, num_inputs), (source, slice(0, num_inputs)), (target, slice(0, num_inputs))))
            if biased:
                bias_parts.append(Part((share.total,), (source,), (target,)))
            start += share.size
        self._is_plain = plain
        self.weight = placement.matrix((num_outputs, num_inputs), matrix_parts, to_pack=not plain)
        self.bias = placement.weight((num_outputs,), bias_parts) if any(has_bias) else None
        if self.bias is not None:
            self.bias.data.zero_()  # of projections without one

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self.multiply(x_TI, self.bias)

    def pack(self) -> None:
        if not self._is_plain:
            super().pack()


class RowLinear(Matrix):
    """A projection whose inputs are split over the ranks; the partial outputs are summed by one all-reduce. The bias is rank 0's alone, so
    that it comes into the sum once."""

    def __init__(self, placement: Placement, share: Share, num_outputs: int, *, bias: bool = False, reduce: bool = True) -> None:
        super().__init__()
        source = (slice(0, num_outputs), slice(share.start, share.stop))
        target = (slice(0, num_outputs), slice(0, share.size))
        self.weight = placement.matrix((num_outputs, share.size), [Part((num_outputs, share.total), source, target)], to_pack=True)
        self.bias = placement.whole((num_outputs,)) if bias else None  # read by every rank: a checkpoint is checked the same on all
        self._comm = placement.comm
        self._is_first = placement.comm.rank == 0
        self._reduce = reduce  # False: the caller adds other partial sums first and reduces once

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        out_TO = self.multiply(x_TI, self.bias if self._is_first else None)
        return self._comm.all_reduce(out_TO) if self._reduce else out_TO


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), split over the intermediate size."""

    def __init__(self, placement: Placement, hidden_size: int, intermediate_size: int, *, bias: bool = False, reduce: bool = True) -> None:
        super().__init__()
        share = placement.share(intermediate_size)
        self.gate_up_proj = ColumnLinear(placement, hidden_size, [share, share], bias=bias)
        self.down_proj = RowLinear(placement, share, hidden_size, bias=bias, reduce=reduce)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up_proj
        if x_TH.is_cuda:
            from workers.kernels import linear, norm

            if linear.can_multiply(x_TH, gate_up.weight):
                return self.down_proj(linear.multiply(x_TH, gate_up.weight, gate_up.bias, gated=True))
            return self.down_proj(norm.silu_mul(gate_up(x_TH)))
        gate_TI, up_TI = gate_up(x_TH).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_TI).mul_(up_TI))
