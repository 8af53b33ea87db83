"""Which tiles suit `workers.kernels.linear` on this card, for the matrices of an 8B model: every candidate is timed beside cuBLAS.

usage: python -m tests.bench.gpu_linear_tiles [--tokens N ...] [--matrix NAME ...] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from tests.bench.gpu_builders import runnable
from tests.bench.gpu_card import seconds
from workers.kernels.linear import Tile, multiply, usual_tile
from workers.kernels.norm import silu_mul

NUM_TOKENS = (1, 16, 32, 64)
CACHE_BYTES = 150 << 20  # of weights in one run: several times the level 2 cache
MIN_SHARED_BYTES, MAX_SHARED_BYTES = 32 << 10, 227 << 10
NUM_SHOWN = 5


class Matrix(NamedTuple):
    name: str
    outputs: int
    inputs: int
    gated: bool = False

    @property
    def num_bytes(self) -> int:
        return 2 * self.outputs * self.inputs


MATRICES = (
    Matrix("qkv", 6144, 4096),
    Matrix("o", 4096, 4096),
    Matrix("gate_up", 28672, 4096, gated=True),
    Matrix("down", 4096, 14336),
    Matrix("head", 128256, 4096),
    Matrix("latent qkv", 3648, 2048),
    Matrix("latent o", 2048, 2048),
    Matrix("latent gate_up", 5632, 2048, gated=True),
    Matrix("latent down", 2048, 2816),
)
Job = tuple[int, Matrix, Tile]


def candidates(num_tokens: int, matrix: Matrix) -> list[Tile]:
    found = []
    for tile in itertools.starmap(Tile, itertools.product((16, 32, 64), (128, 256, 512), (4, 8), (3, 4, 5, 6))):
        rows = tile.outputs * (2 if matrix.gated else 1) + max(16, num_tokens)
        if MIN_SHARED_BYTES <= 2 * rows * tile.inputs * (tile.num_stages - 1) <= MAX_SHARED_BYTES and tile.outputs * tile.inputs >= 4096:
            found.append(tile)
    return found


@cache
def weight_of(matrix: Matrix) -> torch.Tensor:
    return torch.randn((matrix.outputs, matrix.inputs), dtype=torch.bfloat16, device="cuda")


def inputs_of(num_tokens: int, matrix: Matrix) -> torch.Tensor:
    return torch.randn((num_tokens, matrix.inputs), dtype=torch.bfloat16, device="cuda")


def run_once(job: Job) -> None:
    num_tokens, matrix, tile = job
    multiply(inputs_of(num_tokens, matrix), weight_of(matrix), None, gated=matrix.gated, tile=tile)


def microseconds(run: Callable[[torch.Tensor], torch.Tensor], weights: list[torch.Tensor]) -> float:
    """Of one product, of a graph over all weights."""
    graph = torch.cuda.CUDAGraph()
    run(weights[0])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    return 1e6 * seconds(graph.replay) / len(weights)


def search(num_tokens: int, matrix: Matrix, tiles: list[Tile]) -> dict[Tile, float]:
    """Prints the best, and returns all times in microseconds."""
    x = inputs_of(num_tokens, matrix)
    weights = [torch.randn_like(weight_of(matrix)) for _ in range(-(-CACHE_BYTES // matrix.num_bytes))]

    def product(tile: Tile | None) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weight: multiply(x, weight, None, gated=matrix.gated, tile=tile)

    def cublas(weight: torch.Tensor) -> torch.Tensor:
        return silu_mul(F.linear(x, weight)) if matrix.gated else F.linear(x, weight)

    times_us = {tile: microseconds(product(tile), weights) for tile in tiles}
    usual = usual_tile(num_tokens, matrix.outputs // (2 if matrix.gated else 1), gated=matrix.gated)
    usual_us = microseconds(product(None), weights)
    print(
        f"{matrix.name}, {num_tokens} tokens: {usual_us:.2f} us now ({matrix.num_bytes / usual_us / 1e6:.2f} TB/s, {tuple(usual)}), "
        f"cuBLAS {microseconds(cublas, weights):.2f}",
        flush=True,
    )
    for tile in sorted(times_us, key=lambda tile: times_us[tile])[:NUM_SHOWN]:
        print(f"  {times_us[tile]:8.2f}  {tuple(tile)}", flush=True)
    return times_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=NUM_TOKENS)
    parser.add_argument("--matrix", nargs="+", choices=[matrix.name for matrix in MATRICES], default=[matrix.name for matrix in MATRICES])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[tuple[int, Matrix], list[Tile]] = {
        (count, matrix): [] for count in arguments.tokens for matrix in MATRICES if matrix.name in arguments.matrix
    }
    for count, matrix, tile in runnable(run_once, [(*where, tile) for where in found for tile in candidates(*where)]):
        found[count, matrix].append(tile)
    rows = []
    for (count, matrix), tiles in found.items():
        rows += [{"tokens": count, "matrix": matrix.name, "tile": tile, "us": us} for tile, us in search(count, matrix, tiles).items()]
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
