"""Streams through the whole service on a GPU: `mobula serve` on real Ray, clients over gRPC. Prints and saves JSON.

usage: python -m tests.bench.gpu_serve_bench [--shape llama8b] [--checkpoints FOLDER] [--budget SECONDS] [--out FILE] [--chart FILE.png]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
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
NUM_CLIENTS = 4
NUM_CHANNELS = 4  # of a client; a channel is one connection
START_DELAY_S = 0.2  # in which every client has heard of the next start


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


class Client:
    """A process that sends requests. One alone may be slower at reading 256 streams than the service is at sending them."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._channels = self._loop.run_until_complete(self._connect(address))

    async def _connect(self, address: str) -> list[grpc.aio.Channel]:
        channels = [grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(NUM_CHANNELS)]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        return channels

    def run(self, prompts: list[list[int]], num_tokens: int, start_s: float) -> list[list[float]]:
        """Of each prompt when it was sent, at `start_s`, and when each token came, as time.perf_counter() says it in every process."""
        return self._loop.run_until_complete(self._together(prompts, num_tokens, start_s))

    async def _together(self, prompts: list[list[int]], num_tokens: int, start_s: float) -> list[list[float]]:
        stubs: list[Any] = [rpc.InferenceStub(channel) for channel in self._channels]
        await asyncio.sleep(start_s - time.perf_counter())
        return await asyncio.gather(*(self._one(stubs[i % NUM_CHANNELS], prompt, num_tokens) for i, prompt in enumerate(prompts)))

    async def _one(self, stub: Any, prompt: list[int], num_tokens: int) -> list[float]:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        )
        times_s = [time.perf_counter()]
        async for event in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
            now_s = time.perf_counter()
            times_s += [now_s] * len(event.tokens.token_ids)
        return times_s


@cache
def client_of(address: str) -> Client:
    """This process's."""
    return Client(address)


def run_share(address: str, prompts: list[list[int]], num_tokens: int, start_s: float) -> list[list[float]]:
    """RuntimeError, which gets from one process to another, for what the service refuses."""
    try:
        return client_of(address).run(prompts, num_tokens, start_s)
    except grpc.aio.AioRpcError as error:
        raise RuntimeError(f"the service said {error.code().name}: {error.details()}") from None


def measure(address: str, vocab_size: int, budget: Budget, figures: dict[str, float]) -> None:
    """Fills `figures`, a concurrency after the other."""
    rng = random.Random(0)
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(NUM_CLIENTS)]

        def together(count: int, num_tokens: int) -> tuple[float, list[list[float]]]:
            """Seconds from the start to the last token, and the times of each stream."""
            prompts = [rng.choices(range(10, vocab_size - 10), k=STREAM_PROMPT) for _ in range(count)]
            start_s = time.perf_counter() + START_DELAY_S
            shares = (prompts[i::NUM_CLIENTS] for i in range(NUM_CLIENTS))
            futures = [client.submit(run_share, address, share, num_tokens, start_s) for client, share in zip(clients, shares, strict=True)]
            runs = [run for future in futures for run in future.result(REQUEST_TIMEOUT_S)]
            return max(run[-1] for run in runs) - start_s, runs

        together(NUM_CLIENTS, 1)  # the processes start with their first prompt
        for count in CONCURRENCIES:
            if budget.left_s <= 0:
                print(f"{count} streams are skipped: the budget is spent", file=sys.stderr, flush=True)
                continue
            together(count, 8)
            results = [together(count, STREAM_TOKENS) for _ in range(5 if count == 1 else 1)]
            runs = [run for _, each in results for run in each]
            ttfts = sorted((run[1] - run[0]) * 1e3 for run in runs)
            gaps = sorted((b - a) * 1e3 for run in runs for a, b in itertools.pairwise(run[1:]))
            found = {
                f"serve_{count}_ttft_p50_ms": ttfts[len(ttfts) // 2],
                f"serve_{count}_ttft_p99_ms": ttfts[int(len(ttfts) * 0.99)],
                f"serve_{count}_gap_p50_ms": gaps[len(gaps) // 2],
                f"serve_{count}_gap_p99_ms": gaps[int(len(gaps) * 0.99)],
                f"serve_{count}_gap_max_ms": gaps[-1],
                f"serve_{count}_tok_s": len(runs) * STREAM_TOKENS / sum(seconds for seconds, _ in results),
            }
            figures.update(found)
            print(json.dumps({name: round(value, 2) for name, value in found.items()}), file=sys.stderr, flush=True)


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
            measure(address, int(SHAPES[shape]["vocab_size"]), budget, figures)


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
        except RuntimeError as error:
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
