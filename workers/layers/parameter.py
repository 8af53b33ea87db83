"""Parameters that know which slices of which checkpoint tensors they hold on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from workers.layers.packed import can_pack
from workers.parallel import Communicator

Slices = tuple[slice | int, ...]
_GRANULES = (64, 16, 8)  # rows: tensor cores want multiples of 8 at the least
_MIN_GRANULES = 8  # per rank: a coarser cut would leave ranks waiting for the one with most


class Part(NamedTuple):
    """One checkpoint tensor's share in a parameter: `source` slices of the tensor go to `target` slices of the parameter."""

    shape: tuple[int, ...]  # of the whole checkpoint tensor
    source: tuple[slice, ...]
    target: Slices


class Share(NamedTuple):
    """Rows [start, stop) of `total`: what one rank keeps of one dimension."""

    total: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model is built: its rank's communicator and the form of its weights."""

    comm: Communicator
    dtype: torch.dtype
    device: torch.device
    side_stream: torch.cuda.Stream | None = None  # for what can run beside a layer's main work; None on the CPU

    def share(self, total: int) -> Share:
        """This rank's share of a dimension. Where the ranks do not divide it, shares begin at multiples of a granule, so that the matrices
        stay aligned; a dimension smaller than the group leaves some ranks with nothing."""
        world_size, rank = self.comm.world_size, self.comm.rank
        granule = 1
        if total % world_size:
            granule = next((size for size in _GRANULES if total >= size * _MIN_GRANULES * world_size), 1)
        num_granules = -(-total // granule)
        start, stop = (min(total, granule * (num_granules * each // world_size)) for each in (rank, rank + 1))
        return Share(total, start, stop)

    def weight(self, shape: Sequence[int], parts: Sequence[Part], dtype: torch.dtype | None = None) -> nn.Parameter:
        """An uninitialised parameter of `shape` whose `parts` the loader fills, in the order in which `weights` names their tensors."""
        parameter = nn.Parameter(torch.empty(tuple(shape), dtype=dtype or self.dtype, device=self.device), requires_grad=False)
        parameter.parts = tuple(parts)  # type: ignore[attr-defined]
        return parameter

    def matrix(self, shape: Sequence[int], parts: Sequence[Part], *, to_pack: bool = False) -> nn.Parameter:
        """A weight [..., O, I] that activations are multiplied by. On the CPU its memory runs along O: MKL is then a quarter faster on the
        few rows of a decode step. `to_pack`: `packed.Matrix` will rearrange it where it can, and wants it as it is stored."""
        if self.device.type != "cpu" or (to_pack and can_pack(self.dtype)):
            return self.weight(shape, parts)
        *rest, num_outputs, num_inputs = shape
        parameter = self.weight((*rest, num_inputs, num_outputs), parts)
        parameter.data = parameter.data.transpose(-1, -2)
        return parameter

    def whole(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> nn.Parameter:
        """A parameter that holds one checkpoint tensor completely."""
        everything = tuple(slice(0, size) for size in shape)
        return self.weight(shape, [Part(tuple(shape), everything, everything)], dtype)


def whole(total: int) -> Share:
    """The share of a rank that keeps everything."""
    return Share(total, 0, total)
