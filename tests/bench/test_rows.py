"""How a benchmark's figure is turned into a ratio, and when it counts as regressed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import rows
from tests.bench.rows import Row, measured, read_record, write_record


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "RECORD", tmp_path / "recorded.json")
    return tmp_path / "recorded.json"


def test_ratios_are_to_the_reference_the_unit_or_a_python_loop() -> None:
    found = measured(
        [
            Row("a (12 against 13)", 3.0, "ms", "<= 5", True, 1.5, "a bare socket"),
            ("b", 80.0, "% of memcpy", ">= 70", True),
            ("c", 1.25, "x transformers", ">= 1", True),
            ("d", 4.0, "us", "printed", True),
            ("e", 100.0, "/s", ">= 10", True),
        ],
        loop_s=0.5,
    )
    assert [(entry.row.key, entry.ratio, entry.of) for entry in found] == [
        ("a", 2.0, "a bare socket"),
        ("b", 80.0, "memcpy"),
        ("c", 1.25, "transformers"),
        ("d", pytest.approx(8e-6), "a Python loop"),
        ("e", 50.0, "a Python loop"),
    ]
    assert [entry.row.is_higher_better for entry in found] == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("budget", "before", "now", "verdict"),
    [
        ("<= 5", 1.0, 1.15, ""),
        ("<= 5", 1.0, 1.5, "regressed by 50%"),
        ("<= 5", 1.0, 0.1, ""),
        (">= 5", 1.0, 0.7, "regressed by 30%"),
        (">= 5", 1.0, 3.0, ""),
    ],
)
def test_only_what_is_worse_by_more_than_a_fifth_has_regressed(budget: str, before: float, now: float, verdict: str) -> None:
    write_record(measured([Row("a", before, "ms", budget, True, 1.0, "it")], 1.0))
    (entry,) = measured([Row("a", now, "ms", budget, True, 1.0, "it")], 1.0)
    assert entry.verdict(read_record()["rows"]) == verdict


def test_recording_some_rows_keeps_the_others_and_another_reference_compares_with_nothing(record: Path) -> None:
    write_record(measured([Row("a", 1.0, "ms", "<= 5", True, 1.0, "it"), Row("b", 1.0, "ms", "<= 5", True, 1.0, "it")], 1.0))
    write_record(measured([Row("b", 4.0, "ms", "<= 5", True, 2.0, "it")], 1.0))
    kept = read_record()
    assert {key: row["ratio"] for key, row in kept["rows"].items()} == {"a": 1.0, "b": 2.0}
    assert kept["machine"]
    (entry,) = measured([Row("a", 9.0, "ms", "<= 5", True, 1.0, "something else")], 1.0)
    assert entry.verdict(kept["rows"]) == ""
    write_record(measured([Row("tail", 1.0, "ms", "printed", True, 1.0, "it", is_compared=False)], 1.0))
    assert "tail" not in read_record()["rows"]
    assert measured([Row("new", 9.0, "ms", "<= 5", True)], 1.0)[0].verdict(kept["rows"]) == ""
