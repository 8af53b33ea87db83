"""What a card allows: parameters counted against the models themselves, and times against sums done by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.bench.gpu_checkpoint import tensors_of
from tests.bench.gpu_limits import Card, decode_s, kv_bytes_per_token, limits, matrices_of, num_long_streams, prefill_s
from tests.bench.gpu_report import unit_of
from tests.bench.gpu_shapes import SHAPES, write_shape
from workers.kv.layout import page_layout
from workers.models.config import ModelConfig, load_model_config

CARD = Card(copy_bytes_s=4e12, matmul_flop_s=8e14, host_bytes_s=50e9)


def config_of(shape: str, folder: Path) -> ModelConfig:
    return load_model_config(write_shape(shape, folder))


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_matrices_are_those_of_the_model(shape: str, tmp_path: Path) -> None:
    config = config_of(shape, tmp_path)
    parts = {tensor.name: tensor.part.shape for tensor in tensors_of(tmp_path)}
    matrices = matrices_of(config)
    assert matrices.total == sum(math.prod(part) for part in parts.values() if len(part) == 2)
    if matrices.expert:
        assert matrices.expert == sum(math.prod(part) for name, part in parts.items() if "layers.3.mlp.experts.7." in name)
    layout = page_layout(config, block_size=None, dtype="bfloat16", tensor_parallel_size=1, rank=0)
    assert kv_bytes_per_token(config) * layout.block_size == layout.page_bytes


def test_decoding_reads_weights_and_pages(tmp_path: Path) -> None:
    config = config_of("llama8b", tmp_path)
    weights = 2 * (8_030_261_248 - 65 * 4096 - 128256 * 4096)  # all but norms and embedding
    assert decode_s(config, CARD, 1, 0) == pytest.approx(weights / 4e12)
    assert decode_s(config, CARD, 16, 32000) == pytest.approx((weights + 16 * 32000 * 131072) / 4e12)


def test_a_large_batch_multiplies_longer_than_it_reads(tmp_path: Path) -> None:
    config = config_of("llama8b", tmp_path)
    assert decode_s(config, CARD, 4096, 0) == pytest.approx(2 * 4096 * (8_030_261_248 - 65 * 4096 - 128256 * 4096) / 8e14)


def test_experts_are_read_as_they_are_chosen(tmp_path: Path) -> None:
    matrices = matrices_of(config_of("dsv2lite", tmp_path))
    one, all_ = (matrices.layers + matrices.head + count * matrices.expert * 26 for count in (6, 64))
    assert matrices.read(1) == pytest.approx(one)
    assert one < matrices.read(16) < all_
    assert matrices.read(64) == pytest.approx(all_, rel=0.005)
    assert matrices.per_token == pytest.approx(one - matrices.head)


def test_prompts_multiply_and_attend(tmp_path: Path) -> None:
    config = config_of("llama8b", tmp_path)
    matrices = matrices_of(config)
    pairs = 8192 * 8193 // 2
    flops = 2 * 8192 * matrices.layers + 2 * matrices.head + pairs * 2 * 32 * 256 * 32
    assert prefill_s(config, CARD, 8192) == pytest.approx(flops / 8e14)
    assert prefill_s(config, CARD, 1, 8192) == pytest.approx(decode_s(config, CARD, 1, 8192))


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_limits_are_named_as_figures(shape: str, tmp_path: Path) -> None:
    found = limits(config_of(shape, tmp_path), CARD, 8)
    assert all(value > 0 and unit_of(name) in ("ms", "tok/s") for name, value in found.items())
    assert found["restore_8k_pages_ttft_ms"] < found["restore_8k_store_ttft_ms"] < found["restore_8k_cold_ttft_ms"]
    assert found["decode_b1_ms"] < found["decode_b256_ms"]
    assert "decode_32k_b8_ms" in found


def test_the_long_decode_fits_the_card(tmp_path: Path) -> None:
    llama = config_of("llama8b", tmp_path)
    assert [num_long_streams(llama, memory) for memory in (150e9, 85e9, 45e9, 24e9)] == [16, 8, 4, 1]
    assert num_long_streams(config_of("dsv2lite", tmp_path), 85e9) == 16
