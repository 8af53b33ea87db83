"""Measures a card: name, memory, and the rates that limits are computed from. On random data, as zeros draw less power.

usage: python -m tests.bench.gpu_card FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MATMUL_SIZES = (4096, 6144, 8192)
COPY_BYTES = 2 << 30
HOST_BYTES = 1 << 30
_NUM_RUNS = 20


def measure() -> dict[str, Any]:
    """`name`, `memory_bytes`, and `copy_bytes_s`, `matmul_flop_s`, `host_bytes_s` as `gpu_limits.Card` has them."""
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {"name": properties.name, "memory_bytes": properties.total_memory, "torch": torch.__version__}
    found["copy_bytes_s"] = _copy_rate()
    found["matmul_flop_s"] = max(_matmul_rate(size) for size in MATMUL_SIZES)
    found["host_bytes_s"] = _host_rate()
    return found


def _copy_rate() -> float:
    source = torch.randn(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))


def _matmul_rate(size: int) -> float:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return float(2 * size**3 / seconds(lambda: torch.matmul(a, b)))


def _host_rate() -> float:
    source = torch.randint(0, 255, (HOST_BYTES,), dtype=torch.uint8).pin_memory()
    target = torch.empty(HOST_BYTES, dtype=torch.uint8, device="cuda")
    return HOST_BYTES / seconds(lambda: target.copy_(source, non_blocking=True))


def seconds(action: Callable[[], object]) -> float:
    """Of one run, on the device, the mean of several behind each other."""
    for _ in range(3):
        action()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(_NUM_RUNS):
        action()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / _NUM_RUNS


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    found = measure()
    Path(sys.argv[1]).write_text(json.dumps(found))
    print(
        f"{found['name']}, {found['memory_bytes'] / 2**30:.0f} GiB: copy {found['copy_bytes_s'] / 1e12:.2f} TB/s, "
        f"bf16 matmul {found['matmul_flop_s'] / 1e12:.0f} TFLOP/s, from the host {found['host_bytes_s'] / 1e9:.1f} GB/s",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
