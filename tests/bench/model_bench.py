"""One rank on one CPU thread against transformers' `generate`, same checkpoint and prompts, in turn (python -m tests.bench model_bench).

Both run on this process's one thread and are timed by the CPU time it takes, so that what else the machine does counts for neither.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.model_driver import Driver, make_runner

Result = tuple[str, float, str, str, bool]
MAX_STEP_TOKENS = 2048
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def run_mobula(folder: Path, prompts: np.ndarray, num_new: int) -> Callable[[], list[list[int]]]:
    batch_size, length = prompts.shape
    runner = make_runner(folder, kv_memory_bytes=2 << 30, max_num_seqs=batch_size)
    driver = Driver(runner)
    first = 0

    def generate() -> list[list[int]]:
        nonlocal first
        rows = list(range(first, first + batch_size))
        first += batch_size
        for row, prompt in zip(rows, prompts.tolist(), strict=True):
            driver.add(row, prompt)
        per_step = max(1, MAX_STEP_TOKENS // length)
        for start in range(0, batch_size, per_step):
            driver.step(dict.fromkeys(rows[start : start + per_step], length))
        driver.decode(rows, num_new - 1)
        outputs = [driver.known[row][length:] for row in rows]
        for row in rows:
            driver.remove(row)
        return outputs

    return generate


def run_transformers(folder: Path, prompts: np.ndarray, num_new: int) -> Callable[[], list[list[int]]]:
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    ids = torch.from_numpy(prompts)

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False, pad_token_id=0)
        return out[:, prompts.shape[1] :].tolist()

    return generate


def compare(folder: Path, batch_size: int, length: int, num_new: int, rounds: int, budget: float) -> Result:
    prompts = np.random.RandomState(batch_size).randint(0, SHAPE["vocab_size"], (batch_size, length))
    ours, theirs = run_mobula(folder, prompts, num_new), run_transformers(folder, prompts, num_new)
    rates: list[tuple[float, float]] = []
    for round_number in range(rounds):
        times_s = {}
        for generate in (ours, theirs) if round_number % 2 else (theirs, ours):
            started_s = time.process_time()
            generate()
            times_s[generate] = time.process_time() - started_s
        rates.append((batch_size * num_new / times_s[ours], batch_size * num_new / times_s[theirs]))
    ratio = statistics.median(our_rate / their_rate for our_rate, their_rate in rates)
    figures = " against ".join(f"{statistics.median(column):.0f}" for column in zip(*rates, strict=True)) + " tokens/s"
    name = f"CPU engine: batch {batch_size}, prompt {length}, {num_new} new ({figures})"
    return name, ratio, "x transformers", f">= {budget}", ratio >= budget


def main() -> list[Result]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder)
        results = [
            compare(Path(folder), 16, 128, 128, 5, 1.0),
            compare(Path(folder), 64, 128, 128, 5, 1.0),
            compare(Path(folder), 16, 1024, 32, 5, 0.8),
        ]
    for result in results:
        print(*result, sep="  ")
    return results


if __name__ == "__main__":
    main()
