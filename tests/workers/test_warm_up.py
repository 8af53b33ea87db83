"""The steps before the first request's, on a small model."""

from pathlib import Path

import pytest

from workers.config import WorkerConfig
from workers.parallel import Communicator
from workers.runner import Runner
from workers.step import NULL_PAGE
from workers.warm_up import first_plans

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


@pytest.mark.parametrize("model", ["gqa", "mla"])
@pytest.mark.parametrize(("max_num_seqs", "max_tokens", "max_model_len"), [(8, 4096, 3000), (2, 64, 128), (8, 2, 64), (1, 1, 64)])
def test_they_leave_nothing_behind(model: str, max_num_seqs: int, max_tokens: int, max_model_len: int) -> None:
    config = WorkerConfig(
        str(DEMO / model), device="cpu", max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens, max_model_len=max_model_len
    )
    runner = Runner(config, Communicator.single("cpu"), lambda *_: None)
    plans = list(first_plans(max_num_seqs, max_tokens, max_model_len, runner.layout.block_size, 2560))
    for plan in plans:
        assert sum(row.num_query_tokens for row in plan.rows) <= max_tokens
        assert all(page == NULL_PAGE for row in plan.rows_in for page in row.pages)
        assert len(runner.execute(plan)) == len(plan.rows)
    entered = {row.row_id for plan in plans for row in plan.rows_in}
    assert sorted(row for plan in plans for row in plan.rows_out) == sorted(entered), "every row has left again"
    assert not runner.pool.tensor[NULL_PAGE + 1 :].any()
