"""The GPU benchmarks' parts that need no GPU: the checkpoint, the comparison, children, workloads and what their runs leave behind."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import gpu_run
from tests.bench.chart import draw_chart, line_of
from tests.bench.gpu_checkpoint import is_complete, shards_of, tensors_of, write_checkpoint
from tests.bench.gpu_children import run_child
from tests.bench.gpu_report import Compared, compare, table, unit_of
from tests.bench.gpu_run import Clock, Outcome
from tests.bench.gpu_shapes import SHAPES
from tests.bench.gpu_workloads import SERVING, STORING, Answer, Prompt, Workloads
from workers.checkpoint import Checkpoint
from workers.dummy import dummy_weights
from workers.layers.parameter import Placement
from workers.models.config import load_model_config
from workers.models.deepseek import Deepseek
from workers.parallel import Communicator
from workers.weights import check_weights, load_weights, wanted_parts

TINY = SHAPES["dsv2lite"] | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": 211,
}


def test_a_checkpoint_holds_the_made_up_weights(tmp_path: Path) -> None:
    assert write_checkpoint(tmp_path, TINY, shard_bytes=40_000) > 0
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config, placement = load_model_config(tmp_path), Placement(Communicator.single("cpu"), torch.bfloat16, torch.device("cpu"))
    read, made = (Deepseek(config, placement, 16) for _ in range(2))
    with Checkpoint(tmp_path) as checkpoint:
        check_weights(read, config, checkpoint)
        load_weights(read, checkpoint, lambda phase, done, total: None)
    dummy_weights(made, 0, lambda phase, done, total: None)
    for (name, part, ours), (_, _, theirs) in zip(wanted_parts(read), wanted_parts(made), strict=True):
        torch.testing.assert_close(ours.data[part.target].bfloat16(), theirs.data[part.target].bfloat16(), rtol=0, atol=0, msg=name)


def test_a_checkpoint_is_written_once_and_again_for_another_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY)
    assert is_complete(tmp_path, TINY)
    assert write_checkpoint(tmp_path, TINY) == 0
    [file] = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_complete(tmp_path, TINY)
    other = TINY | {"num_hidden_layers": 3}
    assert write_checkpoint(tmp_path, other) > 0
    assert is_complete(tmp_path, other)


def test_shards_keep_the_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    tensors = tensors_of(tmp_path)
    shards = shards_of(tensors, 50_000)
    assert [tensor for shard in shards for tensor in shard] == tensors
    assert all(sum(tensor.num_bytes for tensor in shard) >= 50_000 for shard in shards[:-1])


def test_ratios_are_above_one_where_ours_is_better() -> None:
    rows = compare(
        {"mobula": {"a_ms": 2.0, "b_tok_s": 300.0, "c_tokens": 4.0, "d_pct": 1.0}, "vllm": {"a_ms": 3.0, "b_tok_s": 400.0, "e_s": 1.0}},
        {"a_ms": 1.0, "b_tok_s": 600.0},
    )
    assert [(row.name, row.ratio, row.share_of_limit) for row in rows] == [
        ("a_ms", 1.5, 0.5),
        ("b_tok_s", 0.75, 0.5),
        ("c_tokens", None, None),
        ("d_pct", None, None),
        ("e_s", None, None),
    ]
    lines = table("title", rows, "vllm").splitlines()
    assert lines[0] == "title"
    assert [line.split()[0] for line in lines if "<" in line] == ["b_tok_s"]
    assert "vLLM" not in table("title", [Compared("a_ms", "ms", 1.0, None, None)], "")


def test_lines_of_a_chart(tmp_path: Path) -> None:
    line = line_of({"stream_16_tok_s": 20.0, "stream_1_tok_s": 2.0, "stream_16_gap_p50_ms": 3.0, "mix_512req_tok_s": 9.0}, "stream")
    assert line == {16: 20.0, 1: 2.0}
    pytest.importorskip("matplotlib")
    draw_chart({"ours": line}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_without_matplotlib_says_how_to_draw_it_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="--draw"):
        draw_chart({"ours": {1: 2.0}}, tmp_path / "chart.png")


class FakeSystem:
    """Answers at once. `seconds` of every run."""

    def __init__(self) -> None:
        self.settings = {"fake": True}
        self.is_attached = False
        self.num_pushed = 0

    def generate(
        self, prompts: Sequence[Prompt], num_tokens: int, *, streamed: bool = False, delays_s: Sequence[float] = ()
    ) -> tuple[float, list[Answer]]:
        assert not delays_s or len(delays_s) == len(prompts)
        self.num_pushed += sum(len(prompt) == 32_000 for prompt in prompts)
        return 1e-3 * num_tokens, [Answer(0.0, [0.001 * (i + 1) for i in range(num_tokens)], 8192) for _ in prompts]

    def attach_store(self) -> None:
        self.is_attached = True

    def settle(self) -> None:
        pass


def test_every_workload_gives_figures_with_units() -> None:
    system = FakeSystem()
    workloads = Workloads(system, 32_000, 4)
    for name in (*SERVING, *STORING):
        figures = getattr(workloads, name)()
        assert figures, name
        assert all(unit_of(figure) for figure in figures), name
    assert system.is_attached


def test_a_run_keeps_what_it_has(tmp_path: Path) -> None:
    class Failing(Workloads):
        def shared(self) -> dict[str, float]:
            raise RuntimeError("no")

    outcome = Outcome(tmp_path / "out.json")
    clock = Clock(time.time(), 60.0)
    gpu_run.run(FakeSystem(), Failing(FakeSystem(), 32_000, 4), ["decode", "shared", "mix"], outcome, clock, lambda text: None)
    late = Clock(time.time() - 61.0, 60.0)
    gpu_run.run(FakeSystem(), Workloads(FakeSystem(), 32_000, 4), ["prefill"], outcome, late, lambda text: None)
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert found["failed"] == {"shared": "RuntimeError: no"}
    assert found["skipped"] == ["prefill"]
    assert {"decode_b1_ms", "mix_512req_tok_s"} <= found["figures"].keys()


def test_workloads_of_one_run_want_one_engine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of one of"), gpu_run.loaded("mobula", tmp_path, "dummy", ["decode", "restore"]):
        pass


@pytest.mark.parametrize(("module", "reason"), [("no_such_module", "ended with code 1"), ("timeit", "was ended after 0 s")])
def test_children_that_fail_say_why(module: str, reason: str) -> None:
    arguments = ["-n", "1", "import time; time.sleep(30)"]
    assert reason in run_child(module, arguments, limit_s=60.0 if "code" in reason else 0.3)


def test_a_child_that_has_delivered_and_ends_is_well() -> None:
    assert run_child("timeit", ["-n", "1", "-r", "1", "pass"], limit_s=60.0, on_tick=lambda: True) == ""
