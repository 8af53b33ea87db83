"""Which tiles suit the expert kernels of `workers.kernels.experts` on this card: every candidate is timed, the best are printed.

usage: python -m tests.bench.gpu_tiles [--tokens N ...] [--out FILE.json]

One product's tile changes while the other keeps its usual one. Candidates are built ahead by several processes, into Triton's cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tests.bench.gpu_experts import HIDDEN, NUM_CHOSEN, NUM_EXPERTS, NUM_LAYERS, SIZE, captured, random_layers, random_step
from workers.kernels.experts import Tile, run_streamed, usual_tiles

NUM_TOKENS = (16, 64, 256)
MAX_SHARED_BYTES = 227 << 10  # of one program on Hopper
MAX_SUMS = 128  # registers of a thread
NUM_BUILDERS = 8
NUM_SHOWN = 8
NAMES = ("gate_up", "down")
Pair = tuple[Tile, Tile]


def candidates(product: int, pairs_per_expert: float) -> list[Tile]:
    """Of `gate_up` (0) or `down` (1): that fit, and that hold most experts' pairs at once."""
    matrices = 2 - product
    found = []
    sizes = itertools.product((16, 32, 64), (64, 128, 256), (64, 128), (4, 8), (3, 4, 5), (False, True))
    for tile in itertools.starmap(Tile, sizes):
        shared_bytes = 2 * tile.inner * (matrices * tile.columns + tile.pairs) * tile.num_stages
        sums = matrices * tile.pairs * tile.columns // (32 * tile.num_warps)
        fits = shared_bytes <= MAX_SHARED_BYTES and sums <= MAX_SUMS
        if fits and pairs_per_expert / 2 <= tile.pairs <= max(16, 4 * pairs_per_expert) and tile.columns * tile.inner >= 8192:
            found.append(tile)
    return found


def variations(pairs_per_expert: float) -> list[tuple[int, Pair]]:
    """Each candidate of a product beside the other's usual tile."""
    usual = usual_tiles(pairs_per_expert, torch.bfloat16)
    first = [(0, (tile, usual[1])) for tile in candidates(0, pairs_per_expert)]
    return [*first, *((1, (usual[0], tile)) for tile in candidates(1, pairs_per_expert))]


def build(num_tokens: int, share: list[Pair]) -> None:
    """Runs each once, in a process of its own."""
    layer, step = random_layers(1)[0], random_step(num_tokens)
    for tiles in share:
        run_streamed(*step, *layer, None, tiles)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=NUM_TOKENS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    layers = random_layers(NUM_LAYERS)
    read_ms = 1e3 * 2 * 3 * SIZE * HIDDEN * NUM_EXPERTS
    rows = []
    for num_tokens in arguments.tokens:
        pairs_per_expert = num_tokens * NUM_CHOSEN / NUM_EXPERTS
        found = variations(pairs_per_expert)
        shares = [[tiles for _, tiles in found[start::NUM_BUILDERS]] for start in range(NUM_BUILDERS)]
        with ProcessPoolExecutor(min(NUM_BUILDERS, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as executor:
            list(executor.map(build, [num_tokens] * NUM_BUILDERS, shares))
        step = random_step(num_tokens)
        usual_ms = captured(run_streamed, layers, step)
        timed = [(captured(run_streamed, layers, step, tiles), product, tiles[product]) for product, tiles in found]
        print(
            f"{num_tokens} tokens: {usual_ms:.3f} ms a layer now, {read_ms / usual_ms / 1e9:.2f} TB/s; {len(found)} candidates", flush=True
        )
        for product, name in enumerate(NAMES):
            for milliseconds, _, tile in sorted(each for each in timed if each[1] == product)[:NUM_SHOWN]:
                print(f"  {name:<8} {milliseconds:.3f}  {tile}", flush=True)
        rows += [{"tokens": num_tokens, "product": NAMES[product], "tile": tile, "ms": ms} for ms, product, tile in timed]
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
