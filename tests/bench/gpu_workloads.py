"""The workloads that serving on one GPU is judged by, over any system that can be driven.

A workload returns figures by name. The name ends in the unit: `_ms`, `_s`, `_tok_s`, `_pct` or `_tokens`. Prompts are random and the same
for every system, so nothing is shared that is not meant to be.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

Figures = dict[str, float]
Prompt = Sequence[int]

CONCURRENCIES = (1, 16, 64, 256)
DECODE_CONTEXT, DECODE_TOKENS = 512, 129
LONG_CONTEXT, LONG_TOKENS = 32_000, 65
PREFILL_LENGTHS = (256, 2048, 8192, 32768)
PREFILL_BATCH = (32, 2048)  # prompts and the length of each
SYSTEM_TOKENS, OWN_TOKENS = 8192, 128  # of a shared prompt, and of what follows it
STREAM_PROMPT, STREAM_TOKENS = 256, 96
STORED_CONCURRENCIES = (1, 16, 64)  # beside a store there are pages for no more
RUNNING, RUNNING_TOKENS = 64, 192  # streams that long prompts come upon
LONG_PROMPTS_S = (0.5, 0.75, 1.0, 1.25)  # when one of SYSTEM_TOKENS comes
RESTORE_TAIL = 64  # tokens behind the prefix that is restored
POOL_TOKENS = 56_000  # of pages beside a store: what pushes a prefix out fits hardly more than once
PUSH_PROMPTS = 2  # of LONG_CONTEXT tokens: together more than POOL_TOKENS
OFFLOAD_STREAMS, OFFLOAD_TOKENS = 64, 257


@dataclass
class Answer:
    """One request's way, in seconds of time.perf_counter()."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    num_cached: int | None = None  # prompt tokens that were not computed; None: the system did not say

    @property
    def ttft_ms(self) -> float:
        return (self.token_times_s[0] - self.sent_s) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1e3 for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


class System(Protocol):
    """What serves the prompts."""

    def generate(
        self, prompts: Sequence[Prompt], num_tokens: int, *, streamed: bool = False, delays_s: Sequence[float] = ()
    ) -> tuple[float, Sequence[Answer]]:
        """Sends all prompts at once, or each after its delay (ascending), for exactly `num_tokens` greedy tokens each. Seconds until all
        are there, and the answers; only with `streamed` are tokens wanted as they come, and their times mean something."""
        ...

    def attach_store(self) -> None:
        """From now on blocks that leave the GPU are kept in host memory. Does nothing where they are already."""
        ...

    def settle(self) -> None:
        """Returns when blocks on their way to host memory have arrived, as far as the system lets one know."""
        ...


class Workloads:
    """One method per workload."""

    def __init__(self, system: System, vocab_size: int, num_long_streams: int) -> None:
        self._system = system
        self._random = random.Random(0)
        self._vocab_size = vocab_size
        self._num_long_streams = num_long_streams

    def prompt(self, length: int) -> list[int]:
        return self._random.choices(range(10, self._vocab_size - 10), k=length)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return [self.prompt(length) for _ in range(count)]

    def warm_up(self) -> None:
        self._system.generate(self.prompts(4, 64), 8)

    def _seconds(self, prompts: Sequence[Prompt], num_tokens: int) -> float:
        return self._system.generate(prompts, num_tokens)[0]

    def _ttft_ms(self, prompts: Sequence[Prompt]) -> float:
        """The median over prompts that are sent one after the other."""
        return statistics.median(self._seconds([prompt], 1) for prompt in prompts) * 1e3

    def _step_ms(self, count: int, context: int, num_tokens: int) -> float:
        """The time of `num_tokens` less that of one, on prompts in the cache. The first run also warms this batch size up."""
        prompts = self.prompts(count, context)
        self._seconds(prompts, 8)
        self._system.settle()
        first_s = self._seconds(prompts, 1)
        return (self._seconds(prompts, num_tokens) - first_s) / (num_tokens - 1) * 1e3

    def decode(self) -> Figures:
        return {f"decode_b{count}_ms": self._step_ms(count, DECODE_CONTEXT, DECODE_TOKENS) for count in CONCURRENCIES}

    def long_decode(self) -> Figures:
        count = self._num_long_streams
        return {f"decode_32k_b{count}_ms": self._step_ms(count, LONG_CONTEXT, LONG_TOKENS)}

    def prefill(self) -> Figures:
        figures = {}
        for length in PREFILL_LENGTHS:
            self._seconds([self.prompt(length)], 1)
            figures[f"prefill_{length}_ttft_ms"] = self._ttft_ms(self.prompts(3, length))
        count, length = PREFILL_BATCH
        figures[f"prefill_{count}x{length}_tok_s"] = count * length / self._seconds(self.prompts(count, length), 1)
        return figures

    def shared(self) -> Figures:
        """A system prompt that is in the cache, with tokens of one's own behind it."""
        system = self.prompt(SYSTEM_TOKENS)
        self._seconds([[*system, *self.prompt(16)]], 1)

        def own(count: int) -> list[list[int]]:
            return [[*system, *self.prompt(OWN_TOKENS)] for _ in range(count)]

        return {
            "shared_8k_64req_s": statistics.median(self._seconds(own(64), 32) for _ in range(3)),
            "shared_8k_ttft_ms": self._ttft_ms(own(10)),
            "cold_8k_ttft_ms": self._ttft_ms(self.prompts(3, SYSTEM_TOKENS + OWN_TOKENS)),
        }

    def mix(self) -> Figures:
        """512 requests of 1,024 tokens, half of them shared, 128 tokens out."""
        system = self.prompt(512)
        self._seconds(self.prompts(64, 1024), 8)
        seconds = self._seconds([[*system, *self.prompt(512)] for _ in range(512)], 128)
        return {"mix_512req_tok_s": 512 * 128 / seconds}

    def stream(self) -> Figures:
        return self._streams("stream", CONCURRENCIES)

    def stored_stream(self) -> Figures:
        """The same beside a store."""
        self._system.attach_store()
        return self._streams("stored_stream", STORED_CONCURRENCIES)

    def _streams(self, name: str, concurrencies: Sequence[int]) -> Figures:
        figures: Figures = {}
        for count, num_runs in zip(concurrencies, (5, 3, 3, 2), strict=False):
            self._system.generate(self.prompts(count, STREAM_PROMPT), 8, streamed=True)
            runs = [self._system.generate(self.prompts(count, STREAM_PROMPT), STREAM_TOKENS, streamed=True) for _ in range(num_runs)]
            ttfts = sorted(answer.ttft_ms for _, answers in runs for answer in answers)
            gaps = sorted(gap for _, answers in runs for answer in answers for gap in answer.gaps_ms)
            figures |= {
                f"{name}_{count}_ttft_p50_ms": ttfts[len(ttfts) // 2],
                f"{name}_{count}_gap_p50_ms": gaps[len(gaps) // 2],
                f"{name}_{count}_gap_p99_ms": gaps[int(len(gaps) * 0.99)],
                f"{name}_{count}_gap_max_ms": gaps[-1],
                f"{name}_{count}_tok_s": num_runs * count * STREAM_TOKENS / sum(seconds for seconds, _ in runs),
            }
        return figures

    def interrupted(self) -> Figures:
        """Streams that run while long prompts come, one after the other."""
        delays_s = (*[0.0] * RUNNING, *LONG_PROMPTS_S)
        for _ in range(2):  # the first warms up
            prompts = [*self.prompts(RUNNING, STREAM_PROMPT), *self.prompts(len(LONG_PROMPTS_S), SYSTEM_TOKENS)]
            _, answers = self._system.generate(prompts, RUNNING_TOKENS, streamed=True, delays_s=delays_s)
        gaps = sorted(gap for answer in answers[:RUNNING] for gap in answer.gaps_ms)
        return {
            "interrupted_gap_p50_ms": gaps[len(gaps) // 2],
            "interrupted_gap_p99_ms": gaps[int(len(gaps) * 0.99)],
            "interrupted_gap_max_ms": gaps[-1],
            "interrupted_8k_ttft_p50_ms": statistics.median(answer.ttft_ms for answer in answers[RUNNING:]),
        }

    def offload(self) -> Figures:
        """What a store costs decoding: blocks that fill up meanwhile are offered to it. Must run before anything else attaches it."""

        def step_ms() -> float:
            return statistics.median(self._step_ms(OFFLOAD_STREAMS, DECODE_CONTEXT, OFFLOAD_TOKENS) for _ in range(3))

        without_ms = step_ms()
        self._system.attach_store()
        with_ms = step_ms()
        return {"offload_without_ms": without_ms, "offload_with_ms": with_ms, "offload_slowdown_pct": (with_ms / without_ms - 1) * 100}

    def restore(self) -> Figures:
        """A prefix computed, found in pages, and fetched from host memory after other prompts have pushed it out of the pages."""
        self._system.attach_store()
        times_ms: dict[str, list[float]] = {"cold": [], "pages": [], "store": []}
        cached: dict[str, list[int]] = {place: [] for place in times_ms}
        for _ in range(3):
            prefix = self.prompt(SYSTEM_TOKENS)
            for place, values in times_ms.items():
                self._system.settle()
                if place == "store":
                    self.push_out()
                seconds, [answer] = self._system.generate([[*prefix, *self.prompt(RESTORE_TAIL)]], 1)
                values.append(seconds * 1e3)
                cached[place].append(answer.num_cached or 0)
                print(f"  {place}: {seconds * 1e3:.1f} ms, cached {answer.num_cached}", file=sys.stderr, flush=True)
        figures = {f"restore_8k_{place}_ttft_ms": statistics.median(values) for place, values in times_ms.items()}
        return figures | {f"restore_8k_{place}_cached_tokens": min(counts) for place, counts in cached.items()}

    def push_out(self) -> None:
        self._system.settle()
        for prompt in self.prompts(PUSH_PROMPTS, LONG_CONTEXT):
            self._seconds([prompt], 1)
        self._system.settle()


SERVING = ("decode", "long_decode", "prefill", "shared", "mix", "stream", "interrupted")
STORING = ("offload", "restore", "stored_stream")  # on an engine with a small pool and a store
