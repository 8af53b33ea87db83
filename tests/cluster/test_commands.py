"""`demo` and offline `generate`, as a newcomer runs them."""

import ast
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
        rows = [[cell.strip() for cell in line.strip("│\n").split("│")] for line in text.splitlines() if line.startswith("│")]
        assert [(row[0], row[2]) for row in rows] == [("1", "A"), ("2", "A"), ("3", "A"), ("4", "B"), ("5", "B"), ("6", "A")]
        assert rows[0][1] == rows[2][1] == rows[4][1] != rows[1][1] == rows[3][1] == rows[5][1], "replicas can be told apart"
        for row in rows:
            ttft_ms, num_tokens, from_pages, from_store, computed = map(int, row[3:])
            assert ttft_ms > 0
            assert num_tokens == from_pages + from_store + computed
        assert "def read_json(path):\n" in text
        assert "def count_words(text):\n" in text
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


def test_generate_without_a_model_writes_python() -> None:
    prompt = "def read_json(path):"
    done = subprocess.run(
        [sys.executable, "-m", "runtime.cli", "generate", "--prompt", prompt, "--max-tokens", "64", "--temperature", "0"]
        + ["--store-memory", "64MiB", "--kv-memory", "128MiB"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = (prompt + done.stdout).splitlines()
    parsed = [count for count in range(2, len(lines)) if _parses("\n".join(lines[:count]))]
    assert parsed, f"no leading lines of this are Python:\n{done.stdout}"


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
