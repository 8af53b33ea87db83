"""vLLM as a System: its asynchronous engine with the settings that `vllm serve` would take, on a loop that runs while requests do.

Needs the `vllm` package; nothing here is imported unless it is asked for. See `ENVIRONMENT` for what its process must be started with.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench.gpu_shapes import MAX_MODEL_LEN
from tests.bench.gpu_workloads import POOL_TOKENS, Answer, Prompt
from workers.kv.layout import DEFAULT_BLOCK_SIZE
from workers.models.config import load_model_config

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as its own command line does
    "HF_HUB_OFFLINE": "1",
}
REQUEST_TIMEOUT_S = 300.0
SETTLE_S = 1.0  # it does not tell when blocks have left the GPU
OFFLOAD_GIB = 32.0  # holds all that `restore` computes


class VllmEngine:
    """A System over one AsyncLLM."""

    def __init__(self, runner: asyncio.Runner, llm: Any) -> None:
        self._runner = runner
        self._llm = llm
        self._num_requests = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What it has resolved its own settings to, as far as this version says."""
        import vllm

        config = getattr(self._llm, "vllm_config", None)
        found = {"version": getattr(vllm, "__version__", "")}
        for part, name in (
            ("scheduler_config", "max_num_batched_tokens"),
            ("cache_config", "block_size"),
            ("cache_config", "num_gpu_blocks"),
        ):
            found[name] = getattr(getattr(config, part, None), name, None)
        return found

    def generate(
        self, prompts: Sequence[Prompt], num_tokens: int, *, streamed: bool = False, delays_s: Sequence[float] = ()
    ) -> tuple[float, list[Answer]]:
        """It streams only where that is asked for. RuntimeError when a request ends early, TimeoutError when one does not end."""
        return self._runner.run(self._together(prompts, num_tokens, streamed, delays_s or [0.0] * len(prompts)))

    def attach_store(self) -> None:
        """Its offloading is on from the start."""

    def settle(self) -> None:
        self._runner.run(asyncio.sleep(SETTLE_S))

    async def _together(
        self, prompts: Sequence[Prompt], num_tokens: int, streamed: bool, delays_s: Sequence[float]
    ) -> tuple[float, list[Answer]]:
        began_s = time.perf_counter()
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            requests = [self._one(prompt, num_tokens, streamed, delay_s) for prompt, delay_s in zip(prompts, delays_s, strict=True)]
            answers = await asyncio.gather(*requests)
        return time.perf_counter() - began_s, answers

    async def _one(self, prompt: Prompt, num_tokens: int, streamed: bool, delay_s: float) -> Answer:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=kind)
        self._num_requests += 1
        request_id = str(self._num_requests)
        if delay_s:
            await asyncio.sleep(delay_s)
        answer = Answer(time.perf_counter())
        async for output in self._llm.generate({"prompt_token_ids": prompt}, sampling, request_id=request_id):
            now_s = time.perf_counter()
            answer.token_times_s += [now_s] * len(output.outputs[0].token_ids)
            if (num_cached := getattr(output, "num_cached_tokens", None)) is not None:
                answer.num_cached = num_cached
        if len(answer.token_times_s) != num_tokens:
            raise RuntimeError(f"a request ended after {len(answer.token_times_s)} of {num_tokens} tokens")
        return answer


@contextlib.contextmanager
def serving(folder: Path, load_format: str, tensor_parallel_size: int = 1) -> Iterator[VllmEngine]:
    with _running(folder, load_format, tensor_parallel_size=tensor_parallel_size) as system:
        yield system


@contextlib.contextmanager
def storing(folder: Path, load_format: str, tensor_parallel_size: int = 1) -> Iterator[VllmEngine]:
    """With its native offloading to host memory, and as many tokens in pages as our engine beside a store. The block size is said too, so
    that the number of blocks means that."""
    block_size = DEFAULT_BLOCK_SIZE[load_model_config(folder).codec]
    with _running(
        folder,
        load_format,
        tensor_parallel_size=tensor_parallel_size,
        block_size=block_size,
        num_gpu_blocks_override=POOL_TOKENS // block_size,
        kv_offloading_size=OFFLOAD_GIB,
        kv_offloading_backend="native",
    ) as system:
        yield system


@contextlib.contextmanager
def _running(folder: Path, load_format: str, **settings: Any) -> Iterator[VllmEngine]:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        llm = runner.run(_start(folder, load_format, settings))
        try:
            yield VllmEngine(runner, llm)
        finally:
            llm.shutdown()


async def _start(folder: Path, load_format: str, settings: dict[str, Any]) -> Any:
    """On the loop, where the engine's client belongs."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(folder),
        load_format="dummy" if load_format == "dummy" else "auto",
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=256,
        enable_prefix_caching=True,
        gpu_memory_utilization=0.85,
        disable_log_stats=True,
        **settings,
    )
    return AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop, which its server runs on, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
