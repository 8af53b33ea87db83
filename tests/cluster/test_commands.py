"""`demo` and offline `generate`, as a newcomer runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import Served, eventually

pytestmark = pytest.mark.cluster


def test_demo_shows_reuse_and_leaves_nothing() -> None:
    served = Served("demo")
    try:
        assert served.process.wait(150.0) == 0, "".join(served.errors)
        text = "".join(served.lines.queue)
        memory_gib = re.search(r"([\d.]+) GiB at the end", text)
        assert memory_gib is not None, text
        assert float(memory_gib[1]) <= 3.0
        served.assert_nothing_left(20.0)
    finally:
        served.close()


def test_ctrl_c_in_the_demo_leaves_nothing() -> None:
    served = Served("demo")
    try:
        eventually(lambda: bool(served.find("ray::WorkerActor")), 90.0, "the start of a rank")
        served.interrupt()
        served.assert_nothing_left(60.0)
    finally:
        served.close()


def test_generate_offline_prints_one_json_line(tiny_mla: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runtime.cli", "generate", "--model", str(tiny_mla), "--load-format", "dummy", "--token-ids", "5,6,7"]
        + ["--max-tokens", "6", "--temperature", "0", "--ignore-eos", "--store-memory", "64MiB", "--kv-memory", "32MiB", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert len(printed["token_ids"]) == 6
    assert printed["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "cached_tokens": 0,
        "cached_tokens_by_tier": {"pages": 0, "dram": 0, "disk": 0, "peer": 0},
        "computed_tokens": 3,
        "bytes_loaded": 0,
        "not_reused_tokens_by_reason": {"partial_block": 3},
    }
    assert set(printed["timings"]) == {"queue_s", "ttft_s", "store_wait_s", "total_s"}
