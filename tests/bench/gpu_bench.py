"""`make bench-gpu`: the workloads that serving on one GPU is judged by, for two model shapes with made-up weights. Prints and saves JSON.

usage: python -m tests.bench.gpu_bench [--shape llama8b --shape dsv2lite] [--only decode,prefill,...,restore] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cache_store.config import StoreConfig
from cache_store.process import StoreProcess
from runtime.engine.config import EngineConfig
from runtime.engine.store_port import RemoteStore
from tests.bench.gpu_engine import GpuEngine, dummy_worker, gpu_engine
from tests.bench.gpu_shapes import MAX_MODEL_LEN, SHAPES, write_shape
from workers.kv.layout import page_layout
from workers.models.config import load_model_config

Figures = dict[str, float]


class Workloads:
    """Each returns figures by name. Prompts are random, so nothing is shared that is not meant to be."""

    def __init__(self, engine: GpuEngine, vocab_size: int) -> None:
        self._engine = engine
        self._random = random.Random(0)
        self._vocab_size = vocab_size

    def prompt(self, length: int) -> list[int]:
        return self._random.choices(range(10, self._vocab_size - 10), k=length)

    def decode(self) -> Figures:
        """Milliseconds per step with 512 tokens of context: the time of 129 tokens less that of one, on cached prompts."""
        return {f"decode_b{count}_ms": self._step_ms(count, 512, 129) for count in (1, 16, 64, 256)}

    def long_decode(self) -> Figures:
        return {"decode_32k_b16_ms": self._step_ms(16, 32000, 65)}

    def _step_ms(self, count: int, context: int, num_tokens: int) -> float:
        prompts = [self.prompt(context) for _ in range(count)]
        self._engine.generate(prompts, 1)
        first_s, _ = self._engine.generate(prompts, 1)
        all_s, _ = self._engine.generate(prompts, num_tokens)
        return (all_s - first_s) / (num_tokens - 1) * 1e3

    def prefill(self) -> Figures:
        figures = {}
        for length in (256, 2048, 8192, 32768):
            times_s = [self._engine.generate([self.prompt(length)], 1)[0] for _ in range(3)]
            figures[f"prefill_{length}_ttft_ms"] = statistics.median(times_s) * 1e3
        return figures

    def shared(self) -> Figures:
        """A system prompt of 8k tokens that the replica holds, with 128 tokens of one's own."""
        system = self.prompt(8192)
        self._engine.generate([[*system, *self.prompt(16)]], 1)
        together_s, _ = self._engine.generate([[*system, *self.prompt(128)] for _ in range(64)], 32)
        warm_s = [self._engine.generate([[*system, *self.prompt(128)]], 1)[0] for _ in range(10)]
        cold_s = [self._engine.generate([self.prompt(8320)], 1)[0] for _ in range(3)]
        return {
            "shared_8k_64req_s": together_s,
            "shared_8k_ttft_ms": statistics.median(warm_s) * 1e3,
            "cold_8k_ttft_ms": statistics.median(cold_s) * 1e3,
        }

    def mix(self) -> Figures:
        """512 requests of 1,024 tokens, half of them shared, 128 tokens out."""
        system = self.prompt(512)
        seconds, _ = self._engine.generate([[*system, *self.prompt(512)] for _ in range(512)], 128)
        return {"mix_512req_out_tok_s": 512 * 128 / seconds}

    def stream(self) -> Figures:
        figures = {}
        for count in (1, 16, 64, 256):
            self._engine.generate([self.prompt(256) for _ in range(count)], 8)
            seconds, answers = self._engine.generate([self.prompt(256) for _ in range(count)], 96)
            ttfts = sorted(answer.ttft_ms for answer in answers)
            gaps = sorted(gap for answer in answers for gap in answer.gaps_ms)
            figures |= {
                f"stream_{count}_ttft_p50_ms": ttfts[len(ttfts) // 2],
                f"stream_{count}_ttft_p99_ms": ttfts[int(len(ttfts) * 0.99)],
                f"stream_{count}_gap_p50_ms": gaps[len(gaps) // 2],
                f"stream_{count}_gap_p99_ms": gaps[int(len(gaps) * 0.99)],
                f"stream_{count}_tok_s": count * 96 / seconds,
            }
        return figures


WORKLOADS = ("decode", "long_decode", "prefill", "shared", "mix", "stream")
RESTORE_POOL_TOKENS = 41_600  # of pages: what pushes a prefix out fits hardly more than once
RESTORE_STORE_BYTES = 16 << 30
SETTLE_TIMEOUT_S = 30.0


def measure_restore(shape: str) -> Figures:
    """Milliseconds to the first token of 64 tokens behind an 8k prefix: cold, in pages, and pushed out of them into the store."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = write_shape(shape, Path(folder))
        config = load_model_config(path)
        layout = page_layout(config, block_size=None, dtype=config.dtype, tensor_parallel_size=1, rank=0)
        kv_memory_bytes = RESTORE_POOL_TOKENS // layout.block_size * layout.page_bytes
        store = stack.enter_context(StoreProcess(StoreConfig(memory_bytes=RESTORE_STORE_BYTES, secret="bench")))
        address = store.start(60.0)
        port = stack.enter_context(RemoteStore(address, "bench", "bench"))
        worker = dummy_worker(path, max_model_len=MAX_MODEL_LEN, kv_memory_bytes=kv_memory_bytes)
        engine = stack.enter_context(gpu_engine(worker, EngineConfig(), port))
        workloads = Workloads(engine, int(SHAPES[shape]["vocab_size"]))
        _await(lambda: engine.engine.stats().store_state == "ready")
        engine.generate([workloads.prompt(64)], 8)
        times_ms: dict[str, list[float]] = {"cold": [], "pages": [], "store": []}
        for _ in range(3):
            prefix = workloads.prompt(8192)
            for name in times_ms:
                if name == "store":
                    _await(lambda: not engine.engine.stats().blocks_pending_offer)
                    for _ in range(2):
                        engine.generate([workloads.prompt(32_000)], 1)
                    _await(lambda: not engine.engine.stats().blocks_pending_offer)
                _, [answer] = engine.generate([[*prefix, *workloads.prompt(64)]], 1)
                times_ms[name].append(answer.ttft_ms)
                print(f"  {name}: {answer.ttft_ms:.1f} ms, cached {answer.cached}", file=sys.stderr, flush=True)
    return {f"restore_8k_{name}_ttft_ms": statistics.median(values) for name, values in times_ms.items()}


def _await(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError("the engine does not settle")
        time.sleep(0.01)


def measure(shape: str, only: list[str]) -> Figures:
    if only == ["restore"]:
        return measure_restore(shape)
    with tempfile.TemporaryDirectory() as folder:
        worker = dummy_worker(write_shape(shape, Path(folder)), max_model_len=MAX_MODEL_LEN)
        with gpu_engine(worker, EngineConfig()) as engine:
            figures: Figures = {"start_s": engine.start_s, "num_pages": engine.engine.info.num_pages}
            print(json.dumps(figures), file=sys.stderr, flush=True)
            workloads = Workloads(engine, int(SHAPES[shape]["vocab_size"]))
            engine.generate([workloads.prompt(64) for _ in range(4)], 8)
            for name in only:
                if name == "restore":
                    continue  # has an engine of its own
                run: Callable[[], Figures] = getattr(workloads, name)
                found = run()
                print(json.dumps(found), file=sys.stderr, flush=True)
                figures |= found
    return figures | (measure_restore(shape) if "restore" in only else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--only", default=",".join((*WORKLOADS, "restore")), help="workloads, separated by commas")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = {shape: measure(shape, arguments.only.split(",")) for shape in arguments.shape or sorted(SHAPES)}
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
