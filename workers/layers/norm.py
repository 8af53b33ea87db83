"""RMS normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.layers.parameter import Placement


class RmsNorm(nn.Module):
    """Over the last dimension, of `size`."""

    def __init__(self, placement: Placement, size: int, eps: float) -> None:
        super().__init__()
        self.weight = placement.whole((size,))
        self.eps = eps
        self._shape = (size,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self._shape, self.weight, self.eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + delta), x + delta)."""
        if x.is_cuda:
            from workers.kernels.norm import add_rms_norm

            return add_rms_norm(x, delta, self.weight, self.eps)
        if delta is not None:
            x = x + delta
        return self(x), x
