"""The front door's own cost, with an engine that answers at once: time to first token, and tokens streamed per second.

This process is the client; the front door and the engine without a model have one each. The references are measured in turn: the engine
asked directly, and a bare gRPC server that streams as many messages of one token without any work.
usage: python -m tests.bench.frontdoor_bench [--profile FILE]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cache_store.garbage import settle
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from runtime.engine import frames
from tests.bench.rows import Row
from tests.runtime.frontdoor.model_folder import write_model
from workers.step import SamplingSettings

ROOT = Path(__file__).resolve().parents[2]
NUM_STREAMS = 256
TOKENS_PER_STREAM = 480
STEP_S = 0.002  # of the engine while requests run: offers more than can be streamed
NUM_RUNS = 5
TTFT_BUDGET_MS = 2.0
THROUGHPUT_BUDGET = 20_000.0
OUTPUT_IDS = "140,265,266,50,51,270,271,80,90,280"


def main(profile: str = "") -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, processes(write_model(Path(folder)), profile) as (address, engine_address):
        through_ms, direct_ms = measure_ttft_ms(address, engine_address)
        with child("tests.bench.frontdoor_bench", "--bare") as bare_address:
            pairs = [(asyncio.run(measure_tokens_per_s(address)), asyncio.run(measure_tokens_per_s(bare_address))) for _ in range(NUM_RUNS)]
    rate, bare_rate = (statistics.median(column) for column in zip(*pairs, strict=True))
    own_ms = through_ms - direct_ms
    ttft_name, rate_name = "front door: TTFT minus the engine's, 500 ids, 1 in flight, p50", f"front door: streamed, {NUM_STREAMS} streams"
    return [
        Row(ttft_name, own_ms, "ms", f"<= {TTFT_BUDGET_MS:g} ms", own_ms <= TTFT_BUDGET_MS, direct_ms, "asking the engine directly"),
        Row(
            rate_name, rate, "tokens/s", f">= {THROUGHPUT_BUDGET:g}", rate >= THROUGHPUT_BUDGET, bare_rate, "a bare gRPC server's messages"
        ),
    ]


@contextlib.contextmanager
def processes(folder: Path, profile: str) -> Iterator[tuple[str, str]]:
    """The addresses of a front door and of its engine. Both end when their stdin is closed."""
    with child("tests.runtime.frontdoor.fake_engine", OUTPUT_IDS, str(STEP_S)) as engine_port:
        with child("tests.bench.frontdoor_bench", "--door", str(folder), engine_port, profile) as address:
            yield address, f"127.0.0.1:{engine_port}"


@contextlib.contextmanager
def child(module: str, *arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", module, *arguments]
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline().strip()
            if not line:
                raise RuntimeError(f"{module} did not start")
            yield line
        finally:
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def measure_ttft_ms(address: str, engine_address: str, num_warm: int = 30, num_runs: int = 300) -> tuple[float, float]:
    """Asking the front door and asking the engine over a stream of frames, in turns; from the request to its first token, medians."""
    ids = [10 + index % 280 for index in range(500)]
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(max_tokens=1))
    prompt = array("I", ids).tobytes()
    to_engine: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    through_s, direct_s = [], []
    with grpc.insecure_channel(address) as channel, grpc.insecure_channel(engine_address) as engine_channel:
        stub: Any = rpc.InferenceStub(channel)
        stream = engine_channel.stream_stream(frames.METHOD)(iter(to_engine.get, None), metadata=((frames.SECRET_HEADER, ""),))
        next(stream)  # Hello
        for run in range(num_warm + num_runs):
            started_s = time.perf_counter()
            call = stub.Generate(request, timeout=30)
            next(event for event in call if event.HasField("tokens"))
            through_s.append(time.perf_counter() - started_s)
            list(call)  # the rest of the stream
            started_s = time.perf_counter()
            to_engine.put(frames.encode(frames.Submit(str(run), prompt, b"", list(SamplingSettings()), 1, [], "", "", None)))
            frames.decode(next(stream))
            direct_s.append(time.perf_counter() - started_s)
        to_engine.put(None)
    through_ms, direct_ms = (statistics.median(times_s[num_warm:]) * 1e3 for times_s in (through_s, direct_s))
    print(f"  TTFT through the front door {through_ms:.2f} ms, from the engine {direct_ms:.2f} ms", file=sys.stderr)
    return through_ms, direct_ms


async def measure_tokens_per_s(address: str) -> float:
    """All streams at once. The client keeps messages as bytes and reads the counts off the last: its own cost is not the subject."""
    sampling = pb.SamplingParams(max_tokens=TOKENS_PER_STREAM, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=list(range(10, 30))), sampling=sampling)
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream("/mobula.inference.v1.Inference/Generate", request_serializer=pb.GenerateRequest.SerializeToString)

        async def run() -> tuple[int, int]:
            num_events, last = 0, b""
            async for message in call(request, timeout=120):
                num_events, last = num_events + 1, message
            return pb.GenerateEvent.FromString(last).finished.usage.num_completion_tokens, num_events

        started_s = time.perf_counter()
        results = await asyncio.gather(*(run() for _ in range(NUM_STREAMS)))
        elapsed_s = time.perf_counter() - started_s
    num_tokens = sum(tokens for tokens, _ in results)
    assert num_tokens == NUM_STREAMS * TOKENS_PER_STREAM
    per_event = num_tokens / sum(num_events for _, num_events in results)
    print(f"  {num_tokens / elapsed_s:.0f} tokens/s in events of {per_event:.1f} tokens", file=sys.stderr)
    return num_tokens / elapsed_s


async def run_bare() -> None:
    """A server that knows its messages beforehand."""
    token = pb.GenerateEvent(tokens=pb.Tokens(token_ids=[140], text="th")).SerializeToString()
    usage = pb.Usage(num_completion_tokens=TOKENS_PER_STREAM)
    last = pb.GenerateEvent(finished=pb.Finished(usage=usage)).SerializeToString()

    async def generate(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        for _ in range(TOKENS_PER_STREAM):
            await context.write(token)
        await context.write(last)

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(generate)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("mobula.inference.v1.Inference", {"Generate": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


async def run_door(folder: str, engine_port: str, profile: str) -> None:
    from runtime.frontdoor.server import FrontDoor, FrontDoorConfig
    from runtime.routing.types import Membership, ReplicaMember

    door = FrontDoor(FrontDoorConfig(folder))
    address = await door.start()
    await door.set_membership(Membership(1, (ReplicaMember("r0", f"127.0.0.1:{engine_port}", "ready"),)))
    deadline_s = time.monotonic() + 20
    while not door.router.is_serving(60):
        assert time.monotonic() < deadline_s, "the engine did not answer"
        await asyncio.sleep(0.01)
    settle()
    print(address, flush=True)
    profiler = None
    if profile:
        import cProfile

        profiler = cProfile.Profile()
        profiler.enable()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(profile)
    await door.stop(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--door"]:
        asyncio.run(run_door(*sys.argv[2:5]))
    elif sys.argv[1:2] == ["--bare"]:
        asyncio.run(run_bare())
    else:
        for row in main(sys.argv[2] if sys.argv[1:2] == ["--profile"] else ""):
            print(row)
