"""Pages and stored blocks: whatever the number of ranks, the same bytes in the same places."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from workers.errors import UnsupportedConfig
from workers.kv.layout import PageLayout, page_layout
from workers.kv.pool import PagePool
from workers.models.config import MlaConfig, ModelConfig, RopeConfig

GQA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_model_len=64,
    dtype="float32",
    rope=RopeConfig(),
)
CUT_GROUPS = dataclasses.replace(GQA, num_heads=24, num_kv_heads=6)  # 8 ranks of 3 queries, groups of 4
ONE_HEAD = dataclasses.replace(GQA, num_kv_heads=1)
MLA = dataclasses.replace(GQA, num_layers=5, mla=MlaConfig(None, 12, 8, 4, 8, True))
MODELS = {"gqa": GQA, "one head": ONE_HEAD, "cut groups": CUT_GROUPS, "mla": MLA}


def layouts(config: ModelConfig, tp: int, dtype: str = "float32") -> list[PageLayout]:
    return [page_layout(config, block_size=4, dtype=dtype, tensor_parallel_size=tp, rank=rank) for rank in range(tp)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("written_at", "read_at"), list(itertools.product([1, 2, 4, 8], repeat=2)))
def test_a_block_written_at_one_size_is_read_at_another(name, written_at, read_at):
    """Ranks cut their pages out of a block, the store puts the written parts together, ranks of another size cut theirs out of that."""
    config = MODELS[name]
    block = np.random.RandomState(0).bytes(layouts(config, 1)[0].store.block_bytes)
    stored = bytearray(len(block))
    num_written = np.zeros(layouts(config, 1)[0].store.num_parts, int)
    for layout in layouts(config, written_at):
        size = layout.store.part_bytes
        page = block[layout.first_part * size : (layout.first_part + layout.num_parts) * size]
        assert len(page) == layout.page_bytes
        start = (layout.first_written_part - layout.first_part) * size
        assert start >= 0
        written = page[start : start + layout.num_written_parts * size]
        assert len(written) == layout.num_written_parts * size
        stored[layout.first_written_part * size : layout.first_written_part * size + len(written)] = written
        num_written[layout.first_written_part : layout.first_written_part + layout.num_written_parts] += 1
    assert (num_written == 1).all()
    assert bytes(stored) == block
    for layout in layouts(config, read_at):
        assert layout.store == layouts(config, written_at)[0].store
        size = layout.store.part_bytes
        page = torch.frombuffer(bytearray(stored[layout.first_part * size :][: layout.page_bytes]), dtype=torch.uint8)
        pool = PagePool(layout, 2, torch.device("cpu"))
        pool.page_bytes(1).copy_(page)
        whole = torch.frombuffer(bytearray(block), dtype=torch.float32).view(layout.store.num_parts, *layout.store.part_shape)
        mine = whole[layout.first_part : layout.first_part + layout.num_parts]
        assert torch.equal(pool.tensor[1].view(torch.int32), mine.contiguous().view(torch.int32).view(pool.tensor[1].shape))
        assert not pool.tensor[0].any()


def test_page_shapes_and_defaults():
    assert layouts(GQA, 2)[1].page_shape == (2, 3, 2, 4, 8)
    assert layouts(GQA, 8)[7].page_shape == (1, 3, 2, 4, 8)
    assert [layout.page_shape[0] for layout in layouts(CUT_GROUPS, 8)] == [1, 2, 2, 1, 1, 2, 2, 1]
    assert layouts(MLA, 2)[0].page_shape == (5, 4, 16)
    assert layouts(MLA, 2, "bfloat16")[0].page_bytes == 5 * 4 * 16 * 2
    assert page_layout(GQA, block_size=None, dtype="float32", tensor_parallel_size=1, rank=0).block_size == 16
    assert page_layout(MLA, block_size=None, dtype="float32", tensor_parallel_size=1, rank=0).block_size == 64
    assert layouts(GQA, 1)[0].store.digest() != layouts(GQA, 1, "bfloat16")[0].store.digest()


@pytest.mark.parametrize("config", [GQA, CUT_GROUPS, MLA, dataclasses.replace(MLA, num_layers=27)])
@pytest.mark.parametrize("tp", [1, 2])
def test_pages_are_loaded_a_run_of_layers_after_the_other(config, tp, monkeypatch):
    """Every byte once, and with a run the last bytes of the layers before the next one's first."""
    monkeypatch.setattr("workers.kv.layout._MIN_PIECE_BYTES", 1)
    for layout in layouts(config, tp):
        runs = layout.load_runs
        assert len(runs) == min(4, config.num_layers)
        layers = [*(run.first_layer for run in runs), config.num_layers]
        assert layers == sorted(set(layers))
        assert [part for run in runs for part in run.parts] == list(range(layout.num_parts))
        page = np.zeros(layout.page_bytes, np.uint8)
        by_layer = page.reshape(*([1] if config.mla else []), *layout.page_shape[: 1 if config.mla else 2], -1)  # [heads, layers, bytes]
        for run, end in zip(runs, layers[1:], strict=True):
            for start in run.starts:
                assert not page[start : start + run.num_bytes].any()
                page[start : start + run.num_bytes] = 1
            assert by_layer[:, :end].all()
            assert not by_layer[:, end:].any()
            for part in run.parts:
                assert page.reshape(layout.num_parts, -1)[part].all()


def test_pieces_are_not_cut_too_short(monkeypatch):
    (run,) = layouts(GQA, 2)[1].load_runs
    assert run == (0, (0,), layouts(GQA, 2)[1].page_bytes, range(2))
    layout = layouts(MLA, 1)[0]
    monkeypatch.setattr("workers.kv.layout._MIN_PIECE_BYTES", layout.page_bytes // 2)
    assert [run.first_layer for run in layout.load_runs] == [0, 2]


def test_page_bytes_are_the_page():
    pool = PagePool(layouts(GQA, 1, "bfloat16")[0], 3, torch.device("cpu"))
    pool.page_bytes(2)[:] = 0x40
    assert len(pool.page_bytes(2)) == pool.layout.page_bytes
    assert (pool.tensor[2] == 3.0).all()
    assert not pool.tensor[:2].any()


@pytest.mark.parametrize("tp", [3, 5, 16])
def test_a_size_that_does_not_divide_the_heads_is_refused(tp):
    with pytest.raises(UnsupportedConfig, match=f"size {tp} does not divide num_attention_heads 8"):
        layouts(GQA, tp)
