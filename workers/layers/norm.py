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
        self._shape = (size,)
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self._shape, self.weight, self._eps)
