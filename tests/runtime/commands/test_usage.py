"""Exit codes: 2 where the command line asks for something that cannot be, with one line that names it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "/nowhere", "--replicas", "0"], "--replicas must be at least 1, not 0"),
        (["serve", "/nowhere", "--load-format", "pickle"], "--load-format"),
        (["generate"], "--prompt"),
        (["cache", "replay", "/nowhere", "--blocks", "0"], "--blocks: must be at least 1, not 0"),
        (["cache", "unpin", "--address", "127.0.0.1:1"], "give pins"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], named: str) -> None:
    done = subprocess.run([sys.executable, "-m", "runtime.cli", *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("mobula: ")
    assert named in line
