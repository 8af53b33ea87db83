"""Which kernels run a layer of experts: both ways through `workers.kernels.experts` at sizes from one token to a whole prompt.

usage: python -m tests.bench.gpu_experts [--out FILE.json]

DeepSeek-V2-Lite's experts on random data; tokens choose evenly. The limit is the longer of reading the chosen experts' weights and of
multiplying, at the card's measured rates. A run is a captured graph of several layers, more than the level 2 cache holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bench.gpu_card import measure, seconds
from workers.kernels.experts import run_experts, run_grouped, run_streamed

NUM_TOKENS = (1, 16, 64, 256, 1024, 8192)
NUM_EXPERTS, NUM_CHOSEN, HIDDEN, SIZE = 64, 6, 2048, 1408
NUM_LAYERS = 4
WAYS = {"grouped_mm": run_grouped, "streamed": run_streamed, "chosen": run_experts}


Layer = tuple[torch.Tensor, torch.Tensor]
Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_layers(count: int) -> list[Layer]:
    """Weights of each."""
    shapes = (NUM_EXPERTS, 2 * SIZE, HIDDEN), (NUM_EXPERTS, HIDDEN, SIZE)
    gate_up, down = ([torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(count)] for shape in shapes)
    return list(zip(gate_up, down, strict=True))


def random_step(num_tokens: int) -> Step:
    """Tokens, their experts and weights; the same for the same number."""
    torch.manual_seed(num_tokens)
    x_TH = torch.randn((num_tokens, HIDDEN), dtype=torch.bfloat16, device="cuda")
    experts_TK = torch.rand((num_tokens, NUM_EXPERTS), device="cuda").topk(NUM_CHOSEN).indices.int()
    return x_TH, experts_TK, torch.rand((num_tokens, NUM_CHOSEN), device="cuda")


def captured(run: Callable[..., torch.Tensor], layers: list[Layer], step: Step, *more: object) -> float:
    """Milliseconds of one layer, of a graph of them all."""
    graph = torch.cuda.CUDAGraph()
    run(*step, *layers[0], None, *more)  # builds its kernels
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(*step, *layer, None, *more)
    return 1e3 * seconds(graph.replay) / len(layers)


def measure_row(card: dict[str, Any], layers: list[Layer], num_tokens: int) -> dict[str, float]:
    """Milliseconds of one layer for so many tokens: the limit, and each way's."""
    step = random_step(num_tokens)
    experts_TK = step[1]
    read_s = 2 * 3 * SIZE * HIDDEN * len(experts_TK.unique()) / card["copy_bytes_s"]
    multiply_s = 2 * 3 * SIZE * HIDDEN * experts_TK.numel() / card["matmul_flop_s"]
    found = {f"{name}_ms": captured(run, layers, step) for name, run in WAYS.items()}
    return {"tokens": num_tokens, "limit_ms": 1e3 * max(read_s, multiply_s), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    card = measure()
    layers = random_layers(NUM_LAYERS)
    rows = []
    print(f"{card['name']}, ms a layer\n{'tokens':>8}{'limit':>9}" + "".join(f"{name:>12}" for name in WAYS))
    for num_tokens in NUM_TOKENS:
        row = measure_row(card, layers, num_tokens)
        rows.append(row)
        print(f"{num_tokens:>8}{row['limit_ms']:>9.3f}" + "".join(f"{row[f'{name}_ms']:>12.3f}" for name in WAYS), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"card": card, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
