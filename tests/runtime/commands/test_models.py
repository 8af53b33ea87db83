"""`mobula models` says what the loader does: every family listed loads, every kind of setting listed as refused is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from runtime.cli import app
from runtime.commands.models import announce_model
from runtime.config import ServeSettings
from workers.errors import CheckpointError
from workers.models import MODELS
from workers.models.config import check_tensor_parallel, load_model_config

CONFIG: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
}


@pytest.fixture(scope="module")
def listed() -> dict[str, list[dict[str, Any]]]:
    done = CliRunner().invoke(app, ["models", "--json"])
    assert done.exit_code == 0, done.output
    answer: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return answer


def load(folder: Path, **settings: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(CONFIG | settings))
    return load_model_config(folder)


def test_every_listed_family_loads(listed: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    assert [row["architecture"] for row in listed["families"]] == list(MODELS)
    for row in listed["families"]:
        config = load(tmp_path, architectures=[row["architecture"]], **dict.fromkeys(row["bias_settings"], True))
        assert config.codec == row["attention"]
        assert bool(config.moe) == bool(row["experts"])
        assert [config.attention_bias, config.mlp_bias].count(True) == len(row["bias_settings"])
        window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
        if row["sliding_window"]:
            assert load(tmp_path, architectures=[row["architecture"]], **window).window == 9
        else:
            with pytest.raises(CheckpointError):
                load(tmp_path, architectures=[row["architecture"]], **window)


REFUSED: dict[str, dict[str, Any]] = {
    "architectures": {"architectures": ["GPT2LMHeadModel"]},
    "hidden_act": {"hidden_act": "gelu"},
    "rope type": {"rope_scaling": {"type": "proportional"}},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
    "quantization_config": {"quantization_config": {"quant_method": "awq"}},
    "dtype": {"dtype": "int8"},
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_listed_as_refused_is_refused(listed: dict[str, list[dict[str, Any]]], tmp_path: Path, setting: str) -> None:
    assert setting in {row["setting"] for row in listed["limits"]}
    load(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(CheckpointError, match=setting):
        load(tmp_path, **{"architectures": ["LlamaForCausalLM"]} | REFUSED[setting])


def test_the_other_limits_are_tested_where_they_belong(listed: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Tensors in tests/workers/test_checkpoint.py and test_weights.py; here that no limit is listed without a test."""
    others = {row["setting"] for row in listed["limits"]} - REFUSED.keys()
    assert others == {"rope type, capped", "tensors", "tensor parallel size"}
    capped = load(tmp_path, architectures=["LlamaForCausalLM"], rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=64)
    assert (capped.max_model_len, len(capped.notes)) == (64, 1)
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        check_tensor_parallel(capped, 3)


def test_a_model_is_announced_before_anything_is_started(tmp_path: Path) -> None:
    load(tmp_path, architectures=["LlamaForCausalLM"], rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=64)
    console = Console(file=io.StringIO(), width=200)
    settings = ServeSettings(model=str(tmp_path))
    announce_model(settings, console)
    assert "rope type dynamic is served up to its original context of 64 tokens" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="tensor parallel size 3 does not divide num_attention_heads 8"):
        announce_model(replace(settings, tensor_parallel_size=3), console)


def test_the_table_names_every_family() -> None:
    done = CliRunner().invoke(app, ["models"])
    assert done.exit_code == 0
    assert all(architecture in done.stdout for architecture in MODELS)
