"""Every family against transformers, through engine, ranks and store. `pytest -s` prints the matrix."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from family_cases import FAMILIES, FORMS, ROPES, TP_SIZES, WAYS, cases
from family_matrix import HEADER, Matrix

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_the_matrix_meets_every_family_with_every_value() -> None:
    seen = {(case.family, value) for case in cases() for value in (case.rope, f"form {case.form}", case.tp, "cold", "pages")}
    seen |= {(case.family, value) for case in cases() if case.store_tp for value in ("store", f"store at {case.store_tp}")}
    wanted = itertools.product(
        FAMILIES, [*ROPES, *(f"form {form}" for form in FORMS), *TP_SIZES, *WAYS, *(f"store at {tp}" for tp in TP_SIZES)]
    )
    assert set(wanted) <= seen
    assert any(case.store_tp not in (None, case.tp) for case in cases())  # written at one size, read at another


def test_family_matrix(tmp_path: Path) -> None:
    """Log-softmax of the whole vocabulary within 1e-4 at every scored position, greedy tokens equal where the oracle is sure of them."""
    print(f"\n{HEADER}")
    failed = []
    with Matrix(tmp_path) as matrix:
        for row in matrix.run():
            print(row, flush=True)
            failed += [] if row.ok else [str(row)]
    assert not failed, "\n".join(failed)
