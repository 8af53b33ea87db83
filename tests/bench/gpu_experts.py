"""Which kernels run a layer of experts: both ways through `workers.kernels.experts` at sizes from one token to a whole prompt.

usage: python -m tests.bench.gpu_experts [--out FILE.json]

DeepSeek-V2-Lite's experts on random data; tokens choose evenly. The limit is the longer of reading the chosen experts' weights and of
multiplying, at the card's measured rates. A run is a captured graph of several layers, more than the level 2 cache holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tests.bench.gpu_card import measure, seconds
from workers.kernels.experts import run_experts, run_grouped, run_streamed

NUM_TOKENS = (1, 16, 64, 256, 1024, 8192)
NUM_EXPERTS, NUM_CHOSEN, HIDDEN, SIZE = 64, 6, 2048, 1408
NUM_LAYERS = 4
WAYS = {"grouped_mm": run_grouped, "streamed": run_streamed, "chosen": run_experts}


def measure_row(card: dict[str, Any], weights: list[tuple[torch.Tensor, torch.Tensor]], num_tokens: int) -> dict[str, float]:
    """Milliseconds of one layer for so many tokens: the limit, and each way's."""
    x_TH = torch.randn((num_tokens, HIDDEN), dtype=torch.bfloat16, device="cuda")
    experts_TK = torch.rand((num_tokens, NUM_EXPERTS), device="cuda").topk(NUM_CHOSEN).indices.int()
    weights_TK = torch.rand((num_tokens, NUM_CHOSEN), device="cuda")
    read_s = 2 * 3 * SIZE * HIDDEN * len(experts_TK.unique()) / card["copy_bytes_s"]
    multiply_s = 2 * 3 * SIZE * HIDDEN * experts_TK.numel() / card["matmul_flop_s"]
    row = {"tokens": num_tokens, "limit_ms": 1e3 * max(read_s, multiply_s)}
    for name, run in WAYS.items():
        graph = torch.cuda.CUDAGraph()
        run(x_TH, experts_TK, weights_TK, *weights[0], None)  # builds its kernels
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for layer in weights:
                run(x_TH, experts_TK, weights_TK, *layer, None)
        row[f"{name}_ms"] = 1e3 * seconds(graph.replay) / len(weights)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    card = measure()
    shapes = (NUM_EXPERTS, 2 * SIZE, HIDDEN), (NUM_EXPERTS, HIDDEN, SIZE)
    weights = [
        (torch.randn(shapes[0], dtype=torch.bfloat16, device="cuda"), torch.randn(shapes[1], dtype=torch.bfloat16, device="cuda"))
        for _ in range(NUM_LAYERS)
    ]
    rows = []
    print(f"{card['name']}, ms a layer\n{'tokens':>8}{'limit':>9}" + "".join(f"{name:>12}" for name in WAYS))
    for num_tokens in NUM_TOKENS:
        row = measure_row(card, weights, num_tokens)
        rows.append(row)
        print(f"{num_tokens:>8}{row['limit_ms']:>9.3f}" + "".join(f"{row[f'{name}_ms']:>12.3f}" for name in WAYS), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"card": card, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
