"""Which tiles suit the expert kernels of `workers.kernels.experts` on this card: every candidate is timed, the best are printed.

usage: python -m tests.bench.gpu_tiles [--tokens N ...] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch

from tests.bench.gpu_builders import runnable
from tests.bench.gpu_experts import HIDDEN, NUM_CHOSEN, NUM_EXPERTS, NUM_LAYERS, SIZE, Layer, captured, random_layers, random_step
from workers.kernels.experts import Tile, run_streamed, usual_tiles

NUM_TOKENS = (16, 64, 256)
MIN_SHARED_BYTES = 32 << 10
MAX_SHARED_BYTES = 227 << 10  # of one program on Hopper
MAX_SUMS = 128  # registers of a thread
NUM_SHOWN = 8
NAMES = ("gate_up", "down")
Pair = tuple[Tile, Tile]
Job = tuple[int, int, Pair]  # tokens, product, tiles
_LAYERS: list[Layer] = []  # of this process, once it runs a job


def candidates(product: int, pairs_per_expert: float) -> list[Tile]:
    """Of `gate_up` (0) or `down` (1): that fit, and that hold most experts' pairs at once."""
    matrices = 2 - product
    found = []
    sizes = itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4, 5))
    for tile in itertools.starmap(Tile, sizes):
        shared_bytes = 2 * tile.inner * (matrices * tile.columns + tile.pairs) * (tile.num_stages - 1)
        sums = matrices * tile.pairs * tile.columns // (32 * tile.num_warps)
        fits = MIN_SHARED_BYTES <= shared_bytes <= MAX_SHARED_BYTES and sums <= MAX_SUMS
        holds = 2 / 3 * pairs_per_expert <= tile.pairs <= max(16, 4 * pairs_per_expert)
        if fits and holds and 4096 <= tile.columns * tile.inner <= 16384:
            found.append(tile)
    return found


def run_once(job: Job) -> None:
    num_tokens, _, tiles = job
    if not _LAYERS:
        _LAYERS.extend(random_layers(1))
    run_streamed(*random_step(num_tokens), *_LAYERS[0], None, tiles)


class Search:
    """The tiles for so many tokens. One product's tile changes while the other keeps its usual one."""

    def __init__(self, num_tokens: int, layers: list[Layer]) -> None:
        self.num_tokens = num_tokens
        self.times_ms: tuple[dict[Tile, float], dict[Tile, float]] = {}, {}  # of a layer, by product
        self._layers, self._step = layers, random_step(num_tokens)
        self._pairs_per_expert = num_tokens * NUM_CHOSEN / NUM_EXPERTS
        self._usual = usual_tiles(self._pairs_per_expert, torch.bfloat16)

    def run(self) -> None:
        jobs = [
            (self.num_tokens, product, self._beside(product, tile))
            for product in range(2)
            for tile in candidates(product, self._pairs_per_expert)
        ]
        for _, product, pair in runnable(run_once, jobs):
            self.times_ms[product][pair[product]] = captured(run_streamed, self._layers, self._step, pair)

    def best(self, product: int) -> list[Tile]:
        times_ms = self.times_ms[product]
        return sorted(times_ms, key=lambda tile: times_ms[tile])[:NUM_SHOWN]

    def _beside(self, product: int, tile: Tile) -> Pair:
        return (tile, self._usual[1]) if product == 0 else (self._usual[0], tile)

    def show(self) -> None:
        usual_ms = captured(run_streamed, self._layers, self._step)
        rate = 1e3 * 2 * 3 * SIZE * HIDDEN * NUM_EXPERTS / usual_ms / 1e12
        count = sum(map(len, self.times_ms))
        print(f"{self.num_tokens} tokens: {usual_ms:.3f} ms a layer now, {rate:.2f} TB/s; {count} candidates", flush=True)
        for product, name in enumerate(NAMES):
            for tile in self.best(product):
                print(f"  {name:<8} {self.times_ms[product][tile]:.3f}  {tile}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=NUM_TOKENS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    layers = random_layers(NUM_LAYERS)
    rows: list[dict[str, object]] = []
    for num_tokens in arguments.tokens:
        search = Search(num_tokens, layers)
        search.run()
        search.show()
        for name, times_ms in zip(NAMES, search.times_ms, strict=True):
            rows += [{"tokens": num_tokens, "product": name, "tile": tile._asdict(), "ms": ms} for tile, ms in times_ms.items()]
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
