"""Made-up weights: a function of each tensor's name and a seed, for measuring models whose checkpoint is not at hand."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from workers.layers.parameter import Part
from workers.noise import mix_, mix_int, uniform
from workers.weights import Progress, ProgressReport, wanted_parts

_SPREAD = 0.02 * 3**0.5  # of a uniform distribution with standard deviation 0.02
_ROWS_BYTES = 64 << 20


def dummy_weights(model: nn.Module, seed: int, progress: Progress) -> None:
    """Fills `model` with values that depend only on the tensor's name, its shape, the element and the seed: at any tensor-parallel size
    the ranks' slices are those of the same whole. Norms are 1, biases 0, the others have standard deviation 0.02."""
    report = ProgressReport(progress, sum(parameter.data[part.target].nbytes for _, part, parameter in wanted_parts(model)))
    for tensor, part, parameter in wanted_parts(model):
        target = parameter.data[part.target]
        fill_dummy(target, tensor, part, seed)
        report.add(target.nbytes)


def fill_dummy(target: torch.Tensor, tensor: str, part: Part, seed: int) -> None:
    """What `part.source` takes of the checkpoint tensor named `tensor`, into `target`."""
    if len(part.shape) == 1:
        target.fill_(0.0 if tensor.endswith("bias") else 1.0)
        return
    key = int.from_bytes(hashlib.blake2b(f"{tensor} {seed}".encode(), digest_size=4).digest(), "little")
    first_row, last_row = part.source[0].start, part.source[0].stop
    columns = torch.arange(part.source[1].start, part.source[1].stop, dtype=torch.int32, device=target.device)
    step = max(1, _ROWS_BYTES // (4 * max(1, len(columns))))
    for start in range(first_row, last_row, step):
        stop = min(start + step, last_row)
        rows = mix_(torch.arange(start, stop, dtype=torch.int32, device=target.device) ^ (mix_int(key) >> 1))
        values = uniform(mix_(columns ^ rows[:, None])).mul_(_SPREAD)
        target[start - first_row : stop - first_row] = values.to(target.dtype)
