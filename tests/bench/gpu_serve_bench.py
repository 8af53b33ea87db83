"""Streams through the whole service on a GPU: `mobula serve` on real Ray, clients over gRPC from this process. Prints and saves JSON.

usage: python -m tests.bench.gpu_serve_bench [--shape llama8b] [--checkpoints FOLDER] [--budget SECONDS] [--out FILE] [--chart FILE.png]
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
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from tests.bench.chart import draw_chart, line_of
from tests.bench.gpu_children import Budget, run_child
from tests.bench.gpu_shapes import MAX_MODEL_LEN, SHAPES, write_shape
from tests.bench.gpu_workloads import CONCURRENCIES, STREAM_PROMPT, STREAM_TOKENS

DEVICE = "cuda"
STORE_MEMORY = "4GiB"
START_TIMEOUT_S = 300.0
CHECKPOINT_TIMEOUT_S = 900.0
END_TIMEOUT_S = 60.0
LOG_TAIL_BYTES = 6000
REQUEST_TIMEOUT_S = 120.0
NUM_CHANNELS = 8  # a channel is one connection


@contextlib.contextmanager
def served(folder: Path, load_format: str, timeout_s: float) -> Iterator[tuple[str, float]]:
    """The address, and seconds from the command to `ready`. RuntimeError with the end of what the server printed when that does not come
    within `timeout_s`."""
    command = [sys.executable, "-m", "runtime.cli", "serve", str(folder), "--load-format", load_format, "--port", "0", "--device", DEVICE]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--store-memory", STORE_MEMORY, "--deployment", f"bench-{os.getpid()}"]
    began_s = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        limit = threading.Timer(timeout_s, process.send_signal, [signal.SIGTERM])
        limit.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ready "):
                    limit.cancel()
                    yield line.split()[1], time.perf_counter() - began_s
                    return
                log.write(line.encode())
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - LOG_TAIL_BYTES))
            printed = log.read().decode(errors="replace")
            raise RuntimeError(f"the service was not ready after {time.perf_counter() - began_s:.0f} s; it printed:\n{printed}")
        finally:
            limit.cancel()
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


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


async def measure(address: str, vocab_size: int, budget: Budget, figures: dict[str, float]) -> None:
    """Fills `figures`, a concurrency after the other."""
    rng = random.Random(0)
    channels = [grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(NUM_CHANNELS)]
    stubs: list[Any] = [rpc.InferenceStub(channel) for channel in channels]

    async def together(count: int, num_tokens: int) -> tuple[float, list[list[float]]]:
        prompts = [rng.choices(range(10, vocab_size - 10), k=STREAM_PROMPT) for _ in range(count)]
        began_s = time.perf_counter()
        runs = await asyncio.gather(*(one(stubs[i % NUM_CHANNELS], prompt, num_tokens) for i, prompt in enumerate(prompts)))
        return time.perf_counter() - began_s, runs

    for count in CONCURRENCIES:
        if budget.left_s <= 0:
            print(f"{count} streams are skipped: the budget is spent", file=sys.stderr, flush=True)
            continue
        await together(count, 8)
        repeats = 5 if count == 1 else 1
        results = [await together(count, STREAM_TOKENS) for _ in range(repeats)]
        runs = [run for _, each in results for run in each]
        ttfts = sorted((run[1] - run[0]) * 1e3 for run in runs)
        gaps = sorted((b - a) * 1e3 for run in runs for a, b in itertools.pairwise(run[1:]))
        found = {
            f"serve_{count}_ttft_p50_ms": ttfts[len(ttfts) // 2],
            f"serve_{count}_ttft_p99_ms": ttfts[int(len(ttfts) * 0.99)],
            f"serve_{count}_gap_p50_ms": gaps[len(gaps) // 2],
            f"serve_{count}_gap_p99_ms": gaps[int(len(gaps) * 0.99)],
            f"serve_{count}_tok_s": len(runs) * STREAM_TOKENS / sum(seconds for seconds, _ in results),
        }
        figures.update(found)
        print(json.dumps({name: round(value, 2) for name, value in found.items()}), file=sys.stderr, flush=True)
    for channel in channels:
        await channel.close()


def weights_of(shape: str, checkpoints: Path | None, scratch: Path) -> Path:
    """The folder to serve: of the checkpoints, written where it is not there yet, or one with config.json alone."""
    if checkpoints is None:
        return write_shape(shape, scratch)
    folder = checkpoints / shape
    if reason := run_child("tests.bench.gpu_checkpoint", [shape, str(folder)], limit_s=CHECKPOINT_TIMEOUT_S):
        raise RuntimeError(f"{shape} has no checkpoint: {reason}")
    return folder


def serve_and_measure(shape: str, checkpoints: Path | None, load_format: str, budget: Budget, figures: dict[str, float]) -> None:
    """Fills `figures`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = weights_of(shape, checkpoints, Path(scratch))
        with served(folder, load_format, min(START_TIMEOUT_S, max(1.0, budget.left_s))) as (address, start_s):
            print(f"{shape} ready after {start_s:.1f} s", file=sys.stderr, flush=True)
            figures["serve_start_s"] = start_s
            asyncio.run(measure(address, int(SHAPES[shape]["vocab_size"]), budget, figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER", help="of checkpoints by shape, as gpu_bench has them; else made-up weights"
    )
    parser.add_argument("--load-format", help="as mobula serve takes it; safetensors with --checkpoints, else dummy")
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="what would begin later is skipped")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chart", type=Path)
    arguments = parser.parse_args()
    budget = Budget(arguments.budget)
    load_format = arguments.load_format or ("safetensors" if arguments.checkpoints else "dummy")
    figures: dict[str, dict[str, float]] = {}
    failed = []
    for shape in arguments.shape or sorted(SHAPES):
        if budget.left_s <= 0:
            print(f"{shape} is skipped: the budget is spent", file=sys.stderr, flush=True)
            continue
        figures[shape] = {}
        try:
            serve_and_measure(shape, arguments.checkpoints, load_format, budget, figures[shape])
        except (RuntimeError, grpc.RpcError) as error:
            print(f"{shape}: {error}", file=sys.stderr, flush=True)
            failed.append(shape)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))
    if arguments.chart is not None:
        draw_chart({shape: line for shape, found in figures.items() if (line := line_of(found, "serve"))}, arguments.chart)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
