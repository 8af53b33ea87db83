"""Streams through the whole service on a GPU: `mobula serve` on real Ray, clients over gRPC from this process. Prints and saves JSON.

usage: python -m tests.bench.gpu_serve_bench [--shape llama8b] [--out FILE] [--chart FILE.png]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from tests.bench.gpu_shapes import MAX_MODEL_LEN, SHAPES, write_shape

CONCURRENCIES = (1, 16, 64, 256)
PROMPT_TOKENS, NEW_TOKENS = 256, 96
START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 120.0
NUM_CHANNELS = 8  # a channel is one connection


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, float]]:
    """The address, and seconds from the command to `ready`."""
    command = [sys.executable, "-m", "runtime.cli", "serve", str(folder), "--load-format", "dummy", "--port", "0", "--device", "cuda"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--store-memory", "4GiB", "--deployment", f"bench-{os.getpid()}"]
    began_s = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ready "):
                    yield line.split()[1], time.perf_counter() - began_s
                    return
                if time.perf_counter() - began_s > START_TIMEOUT_S:
                    break
            raise RuntimeError("the service did not start")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60.0)


async def one(stub: Any, prompt: list[int], num_tokens: int) -> list[float]:
    """When it was sent, and when each token came."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    )
    times_s = [time.perf_counter()]
    async for event in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
        now_s = time.perf_counter()
        times_s += [now_s] * len(event.tokens.token_ids)
    return times_s


async def measure(address: str, vocab_size: int) -> dict[str, float]:
    rng = random.Random(0)
    figures: dict[str, float] = {}
    channels = [grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(NUM_CHANNELS)]
    stubs: list[Any] = [rpc.InferenceStub(channel) for channel in channels]

    async def together(count: int, num_tokens: int) -> tuple[float, list[list[float]]]:
        prompts = [rng.choices(range(10, vocab_size - 10), k=PROMPT_TOKENS) for _ in range(count)]
        began_s = time.perf_counter()
        runs = await asyncio.gather(*(one(stubs[i % NUM_CHANNELS], prompt, num_tokens) for i, prompt in enumerate(prompts)))
        return time.perf_counter() - began_s, runs

    for count in CONCURRENCIES:
        await together(count, 8)
        repeats = 5 if count == 1 else 1
        results = [await together(count, NEW_TOKENS) for _ in range(repeats)]
        runs = [run for _, each in results for run in each]
        ttfts = sorted((run[1] - run[0]) * 1e3 for run in runs)
        gaps = sorted((b - a) * 1e3 for run in runs for a, b in itertools.pairwise(run[1:]))
        figures |= {
            f"serve_{count}_ttft_p50_ms": ttfts[len(ttfts) // 2],
            f"serve_{count}_ttft_p99_ms": ttfts[int(len(ttfts) * 0.99)],
            f"serve_{count}_gap_p50_ms": gaps[len(gaps) // 2],
            f"serve_{count}_gap_p99_ms": gaps[int(len(gaps) * 0.99)],
            f"serve_{count}_tok_s": len(runs) * NEW_TOKENS / sum(seconds for seconds, _ in results),
        }
        print(json.dumps({name: round(value, 2) for name, value in figures.items() if f"_{count}_" in name}), file=sys.stderr, flush=True)
    for channel in channels:
        await channel.close()
    return figures


def draw_chart(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Tokens per second against concurrent streams, a line per shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    for shape, values in figures.items():
        axes.plot(CONCURRENCIES, [values[f"serve_{count}_tok_s"] for count in CONCURRENCIES], marker="o", label=shape)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("concurrent streams")
    axes.set_ylabel("output tokens per second")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chart", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for shape in arguments.shape or sorted(SHAPES):
        with tempfile.TemporaryDirectory() as folder, served(write_shape(shape, Path(folder))) as (address, start_s):
            print(f"{shape} ready after {start_s:.1f} s", file=sys.stderr, flush=True)
            figures[shape] = {"serve_start_s": start_s, **asyncio.run(measure(address, int(SHAPES[shape]["vocab_size"])))}
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
    if arguments.chart is not None:
        draw_chart(figures, arguments.chart)


if __name__ == "__main__":
    main()
