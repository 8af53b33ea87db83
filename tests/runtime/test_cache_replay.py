"""`mobula cache replay` from the command line: its table, its chart, and what it says when it cannot work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime.cli import app
from runtime.errors import UsageError


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    requests = [[0, 1, 2], [0, 3], [0, 1, 2, 4], [5], [0, 1, 2]]
    path.write_text("".join(json.dumps({"hash_ids": ids}) + "\n" for ids in requests))
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["cache", "replay", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_rates_beside_lru_infinite_and_belady(trace: Path) -> None:
    told = json.loads(run(trace, "--blocks", 3, "--blocks", 100, "--policy", "arc", "--json"))
    assert told["sizes"] == [3, 100]
    assert list(told["rates"]) == ["infinite", "belady", "lru", "arc"]
    assert told["rates"]["infinite"] == [7 / 13, 7 / 13]
    assert all(rates[1] == 7 / 13 for rates in told["rates"].values())
    assert told["rates"]["lru"][0] <= told["rates"]["belady"][0]
    table = run(trace, "--blocks", 100)
    assert "hit-density" in table
    assert "53.8" in table


def test_a_chart_is_drawn(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # of the extra `charts`
    chart = tmp_path / "chart.png"
    run(trace, "--blocks", 3, "--blocks", 100, "--policy", "arc", "--chart", chart)
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_missing_library_is_named_before_the_work(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"--chart: needs matplotlib.*mobula\[charts\]"):
        run(trace, "--blocks", 3, "--chart", tmp_path / "chart.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", 0], "--blocks"),
        (["--blocks", 3, "--policy", "magic"], "--policy: 'magic' is none of"),
        (["--blocks", 3, "--chart", "/no/such/folder/a.png"], "--chart /no/such/folder/a.png: there is no such folder"),
    ],
)
def test_wrong_options_are_named(trace: Path, arguments: list[object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(trace, *arguments)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="TRACE"):
        run(tmp_path / "none.jsonl", "--blocks", 3)
