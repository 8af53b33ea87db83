"""Which kernels run a layer of experts: both ways through `workers.kernels.experts` at sizes from one token to a whole prompt.

usage: python -m tests.bench.gpu_experts [--out FILE.json]

DeepSeek-V2-Lite's experts on random data; tokens choose evenly. The limit is the longer of reading the chosen experts' weights and of
multiplying, at the card's measured rates. A run is longer than the level 2 cache holds: each reads other weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch

from tests.bench.gpu_card import measure, seconds
from workers.kernels.experts import run_experts, run_grouped, run_streamed

NUM_TOKENS = (1, 16, 64, 256, 1024, 8192)
NUM_EXPERTS, NUM_CHOSEN, HIDDEN, SIZE = 64, 6, 2048, 1408
NUM_LAYERS = 4
WAYS = {"grouped_mm": run_grouped, "streamed": run_streamed, "chosen": run_experts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    card = measure()
    layers = [
        tuple(torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02 for shape in ((2 * SIZE, HIDDEN), (HIDDEN, SIZE)))
        for _ in range(NUM_LAYERS)
    ]
    weights = [(gate_up.repeat(NUM_EXPERTS, 1, 1), down.repeat(NUM_EXPERTS, 1, 1)) for gate_up, down in layers]
    rows = []
    print(f"{card['name']}, ms a layer\n{'tokens':>8}{'limit':>9}" + "".join(f"{name:>12}" for name in WAYS))
    for num_tokens in NUM_TOKENS:
        x_TH = torch.randn((num_tokens, HIDDEN), dtype=torch.bfloat16, device="cuda")
        experts_TK = torch.rand((num_tokens, NUM_EXPERTS), device="cuda").topk(NUM_CHOSEN).indices.int()
        weights_TK = torch.rand((num_tokens, NUM_CHOSEN), device="cuda")
        expert_elements = 3 * SIZE * HIDDEN
        read_s = 2 * expert_elements * len(experts_TK.unique()) / card["copy_bytes_s"]
        limit_ms = 1e3 * max(read_s, 2 * expert_elements * num_tokens * NUM_CHOSEN / card["matmul_flop_s"])
        row = {"tokens": num_tokens, "limit_ms": limit_ms}
        for name, run in WAYS.items():
            layer = itertools.cycle(weights)
            row[f"{name}_ms"] = 1e3 * seconds(lambda run=run, layer=layer: run(x_TH, experts_TK, weights_TK, *next(layer), None))  # type: ignore[misc]
        rows.append(row)
        print(f"{num_tokens:>8}{limit_ms:>9.3f}" + "".join(f"{row[f'{name}_ms']:>12.3f}" for name in WAYS), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"card": card, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
