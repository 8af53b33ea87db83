"""Which of FlashInfer's kernels suits captured batches of an 8B model on this card: its keys split among programs or not.

usage: python -m tests.bench.gpu_attention [--out FILE.json]

A layer's attention in microseconds, of a captured graph over several layers. A prompt is one row; of decode rows all have as many keys.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cache_store.keys import Layout
from tests.bench.gpu_card import seconds
from workers.attention.base import AttentionShape
from workers.attention.flashinfer_wrappers import CapturedBuffers, Planned, Wrappers
from workers.kv.layout import PageLayout
from workers.kv.pool import PagePool

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_LAYERS = 32, 8, 128, 16, 8
NUM_PAGES = 36_864  # of all rows; together twenty times the level 2 cache
PROMPT_TOKENS, PROMPT_KEYS = (16, 64, 128, 256), (256, 512, 1024, 2048, 4096, 8192)
DECODE_ROWS, DECODE_KEYS = (1, 16, 64, 128, 256), (512, 1024, 2048)


class Case(NamedTuple):
    rows: int
    queries: int  # of a row
    keys: int  # of a row

    @property
    def name(self) -> str:
        return f"{self.rows} decode rows of {self.keys}" if self.queries == 1 else f"{self.queries} tokens of {self.keys}"


def new_wrappers(device: torch.device) -> Wrappers:
    page_shape = (NUM_KV_HEADS, NUM_LAYERS, 2, BLOCK_SIZE, HEAD_DIM)
    layout = PageLayout(Layout("any", 0, BLOCK_SIZE, "bfloat16", 1, page_shape), 1, 0, page_shape, "bfloat16", 0, 1, 0, 1)
    pool = PagePool(layout, NUM_PAGES, device)
    pool.tensor.normal_()
    return Wrappers(AttentionShape(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5), pool)


def microseconds(wrappers: Wrappers, planned: Planned, case: Case, **options: Any) -> float:
    """Of one layer."""
    device, num_pages = wrappers.device, case.keys // BLOCK_SIZE
    starts = torch.arange(0, (case.rows + 1) * num_pages, num_pages, dtype=torch.int32)
    pages = torch.from_numpy(np.random.RandomState(0).permutation(NUM_PAGES)[: case.rows * num_pages].astype(np.int32)).to(device)
    lengths = torch.full((case.rows,), case.keys, dtype=torch.int32)
    queries = [] if case.queries == 1 else [torch.arange(0, (case.rows + 1) * case.queries, case.queries, dtype=torch.int32)]
    options |= {} if case.queries == 1 else {"causal": True}
    planned.plan(
        *queries, starts, pages, torch.full_like(lengths, BLOCK_SIZE), NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
        q_data_type=wrappers.dtype, kv_data_type=wrappers.dtype, sm_scale=wrappers.shape.scale, seq_lens=lengths, **options,
    )  # fmt: skip
    q = torch.randn((case.rows * case.queries, NUM_HEADS, HEAD_DIM), dtype=wrappers.dtype, device=device)
    out, tensor = torch.empty_like(q), wrappers.pool.tensor

    def run() -> None:
        for layer in range(NUM_LAYERS):
            planned.wrapper.run(q, (tensor[:, :, layer, 0], tensor[:, :, layer, 1]), out=out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e6 * seconds(graph.replay) / NUM_LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    wrappers = new_wrappers(device)
    cases = [Case(1, *each) for each in itertools.product(PROMPT_TOKENS, PROMPT_KEYS) if each[1] >= each[0]]
    cases += [Case(rows, 1, keys) for rows, keys in itertools.product(DECODE_ROWS, DECODE_KEYS) if rows * keys <= NUM_PAGES * BLOCK_SIZE]
    found = []
    for case in cases:
        times_us: dict[str, float] = {}
        for name, options in (("split", {}), ("whole", {"disable_split_kv": True})):
            buffers = CapturedBuffers(case.rows, case.rows * case.keys // BLOCK_SIZE, device)
            planned = wrappers.new_decode(buffers) if case.queries == 1 else wrappers.new_prefill("fa2", buffers)
            times_us[name] = microseconds(wrappers, planned, case, **options)
        if case.queries > 1 and wrappers.kernel == "fa3":
            buffers = CapturedBuffers(case.rows, case.rows * case.keys // BLOCK_SIZE, device)
            times_us["fa3"] = microseconds(wrappers, wrappers.new_prefill("fa3", buffers), case)
        print(f"{case.name:>28}: {', '.join(f'{name} {us:.1f}' for name, us in times_us.items())} us", flush=True)
        found.append({**case._asdict(), **times_us})
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
