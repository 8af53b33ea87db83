"""Every attention backend against the reference, over random steps: page sizes, head counts, ragged lengths, cached prefixes."""

import dataclasses
import importlib
from typing import NamedTuple

import numpy as np
import pytest
import torch
from attention_batches import make_batch, make_pools

from workers.attention.base import BACKENDS, AttentionBatch, AttentionShape, make_backend
from workers.errors import UnsupportedConfig
from workers.kv.layout import page_layout
from workers.models.config import ModelConfig, RopeConfig, kv_heads_of_rank
from workers.runner import attention_shape

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUM_LAYERS = 3
NUM_PAGES = 64
GQA = ModelConfig("LlamaForCausalLM", 9, 8, 8, NUM_LAYERS, 8, 4, 8, 1e-6, 64, "float32", RopeConfig())


class Row(NamedTuple):
    num_cached: int
    num_queries: int


def batch_of(rows: list[Row], block_size: int, rng: np.random.RandomState) -> AttentionBatch:
    return make_batch(rows, block_size, range(1, NUM_PAGES), rng)


def random_rows(rng: np.random.RandomState, block_size: int) -> list[Row]:
    """Ascending numbers of queries, with lengths on both sides of every page boundary."""
    decode = [Row(int(rng.choice([0, 1, block_size - 1, block_size, 2 * block_size + 1])), 1) for _ in range(rng.randint(0, 6))]
    chunks = [Row(int(rng.choice([0, 0, 3, block_size])), rng.randint(2, 2 * block_size + 2)) for _ in range(rng.randint(0, 4))]
    return decode + sorted(chunks, key=lambda row: row.num_queries) or [Row(0, 1)]


def make_pair(name: str, shape: AttentionShape, page_shape: tuple[int, ...], block_size: int):
    """The backend and the reference, over two pools with the same random content."""
    pools = make_pools(page_shape, block_size, NUM_PAGES, "float32", torch.device("cpu"))
    try:
        return make_backend(name, shape, pools[0]), make_backend("reference", shape, pools[1])
    except UnsupportedConfig as error:  # tests/gpu runs these shapes where it can
        pytest.skip(str(error))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_gqa(name, num_heads, num_kv_heads, block_size):
    rng = np.random.RandomState(num_heads + block_size)
    torch.manual_seed(block_size)
    shape = AttentionShape(num_heads, num_kv_heads, 8, 8**-0.5)
    backend, reference = make_pair(name, shape, (num_kv_heads, NUM_LAYERS, 2, block_size, 8), block_size)
    for _ in range(8):
        batch = batch_of(random_rows(rng, block_size), block_size, rng)
        num_tokens = batch.query_starts[-1]
        backend.begin(batch)
        reference.begin(batch)
        for layer in range(NUM_LAYERS):
            q_TND, kv_TKD = torch.randn(num_tokens, num_heads, 8), torch.randn(num_tokens, 2 * num_kv_heads, 8)
            for each in (backend, reference):
                each.write_gqa(layer, kv_TKD)
            close(backend.gqa(layer, q_TND), reference.gqa(layer, q_TND))
    assert torch.equal(backend.pool.tensor, reference.pool.tensor)


def cases(capability: str) -> list[str]:
    """The backends that say they heed it. The reference is one of them, so there is always one."""
    found = []
    for name, target in BACKENDS.items():
        module, _, cls = target.partition(":")
        if getattr(getattr(importlib.import_module(module), cls), capability):
            found.append(name)
    return found


@pytest.mark.parametrize("name", cases("has_window"))
@pytest.mark.parametrize("window", [1, 5, 16, 40])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_gqa_in_a_window(name, window, block_size):
    """Garbage beyond the window must not be seen: the pages there are filled with large numbers after they were written."""
    rng = np.random.RandomState(window + block_size)
    torch.manual_seed(window)
    shape = AttentionShape(6, 2, 8, 8**-0.5, window=window)
    backend, reference = make_pair(name, shape, (2, NUM_LAYERS, 2, block_size, 8), block_size)
    for _ in range(6):
        batch = batch_of(random_rows(rng, block_size), block_size, rng)
        num_tokens = batch.query_starts[-1]
        for each in (backend, reference):
            each.begin(batch)
        q_TND, kv_TKD = torch.randn(num_tokens, 6, 8), torch.randn(num_tokens, 4, 8)
        for each in (backend, reference):
            each.write_gqa(1, kv_TKD)
        for row in range(batch.num_decode_rows):  # what a decode row's window does not reach is of no account
            for position in range(max(0, batch.seq_lens[row] - window)):
                page = batch.block_table[row, position // block_size]
                backend.pool.tensor[page, :, 1, :, position % block_size] = 1e4
        close(backend.gqa(1, q_TND), reference.gqa(1, q_TND))
        backend.pool.tensor.copy_(reference.pool.tensor)


@pytest.mark.parametrize("name", cases("has_unequal_groups"))
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "tp"), [(12, 3, 2), (12, 3, 4), (6, 2, 3), (20, 4, 10), (15, 5, 3)])
def test_gqa_on_ranks_whose_groups_are_cut(name, num_heads, num_kv_heads, tp):
    """What the ranks compute is, head by head, what one rank with all heads computes."""
    rng = np.random.RandomState(num_heads + tp)
    torch.manual_seed(tp)
    config = dataclasses.replace(GQA, num_heads=num_heads, num_kv_heads=num_kv_heads)
    whole = make_pair("reference", AttentionShape(num_heads, num_kv_heads, 8, 8**-0.5), (num_kv_heads, NUM_LAYERS, 2, 4, 8), 4)[1]
    batch = batch_of([Row(9, 1), Row(4, 1), Row(3, 6)], 4, rng)
    whole.begin(batch)
    q_TND, kv_TKD = torch.randn(8, num_heads, 8), torch.randn(8, 2, num_kv_heads, 8)
    whole.write_gqa(1, kv_TKD.flatten(1, 2))
    expected = whole.gqa(1, q_TND)
    for rank in range(tp):
        layout = page_layout(config, block_size=4, dtype="float32", tensor_parallel_size=tp, rank=rank)
        shape = attention_shape(config, layout, tp)
        heads = kv_heads_of_rank(config, tp, rank)
        backend, _ = make_pair(name, shape, (len(heads), NUM_LAYERS, 2, 4, 8), 4)
        backend.pool.tensor.copy_(whole.pool.tensor[:, heads.start : heads.stop])
        backend.begin(batch)
        backend.write_gqa(1, kv_TKD[:, :, heads.start : heads.stop].flatten(1, 2))
        queries = slice(rank * shape.num_heads, (rank + 1) * shape.num_heads)
        close(backend.gqa(1, q_TND[:, queries].contiguous()), expected[:, queries])


def test_a_backend_that_cannot_is_named(monkeypatch):
    monkeypatch.setattr("workers.attention.torch_paged.TorchPagedAttention.has_window", False)
    monkeypatch.setattr("workers.attention.torch_paged.TorchPagedAttention.has_unequal_groups", False)
    pool = make_pair("reference", AttentionShape(1, 1, 8, 1.0), (1, 1, 2, 4, 8), 4)[0].pool
    windowed, unequal = AttentionShape(1, 1, 8, 1.0, window=3), AttentionShape(3, 2, 8, 1.0, group_size=4, first_query=2)
    with pytest.raises(UnsupportedConfig, match="torch_paged has no sliding window"):
        make_backend("torch_paged", windowed, pool)
    with pytest.raises(UnsupportedConfig, match="num_key_value_heads"):
        make_backend("torch_paged", unequal, pool)


def test_where_the_default_cannot_torch_paged_stands_in(monkeypatch):
    monkeypatch.setattr("workers.attention.base.DEFAULT_BACKENDS", {"cpu": ["reference", "torch_paged"]})
    monkeypatch.setattr("workers.attention.reference.ReferenceAttention.has_window", False)
    pool = make_pair("reference", AttentionShape(1, 1, 8, 1.0), (1, 1, 2, 4, 8), 4)[0].pool
    assert type(make_backend("auto", AttentionShape(1, 1, 8, 1.0), pool)).__name__ == "ReferenceAttention"
    assert type(make_backend("auto", AttentionShape(1, 1, 8, 1.0, window=3), pool)).__name__ == "TorchPagedAttention"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 20])
def test_mla(name, num_heads, block_size, workspace_bytes, monkeypatch):
    """Both forms, with every split of the rows between them; a tiny workspace makes every chunk one block long."""
    latent_dim, nope_dim, rope_dim, value_dim = 12, 6, 4, 5
    monkeypatch.setattr("workers.attention.torch_paged.WORKSPACE_BYTES", {"cpu": workspace_bytes})
    rng = np.random.RandomState(num_heads + block_size)
    torch.manual_seed(block_size)
    shape = AttentionShape(num_heads, 1, 0, 0.3, latent_dim)
    backend, reference = make_pair(name, shape, (NUM_LAYERS, block_size, latent_dim + rope_dim), block_size)
    for _ in range(5):
        batch = batch_of(random_rows(rng, block_size), block_size, rng)
        num_tokens = batch.query_starts[-1]
        split = rng.randint(batch.num_decode_rows, batch.num_rows + 1)
        first_plain = batch.query_starts[split]
        up_OC = torch.randn(num_heads * (nope_dim + value_dim), latent_dim)
        backend.begin(batch)
        reference.begin(batch)
        for layer in range(NUM_LAYERS):
            latent_TP = torch.randn(num_tokens, latent_dim + rope_dim)
            q_TNP = torch.randn(first_plain, num_heads, latent_dim + rope_dim)
            q_TND = torch.randn(num_tokens - first_plain, num_heads, nope_dim + rope_dim)
            results = []
            for each in (backend, reference):
                each.write_mla(layer, latent_TP)
                absorbed = each.mla_absorbed(layer, *q_TNP.split([latent_dim, rope_dim], dim=-1), range(split)) if split else None
                plain = each.mla_plain(layer, q_TND, up_OC, value_dim, range(split, batch.num_rows)) if split < batch.num_rows else None
                results.append([out for out in (absorbed, plain) if out is not None])
            for actual, expected in zip(*results, strict=True):
                close(actual, expected)
    assert torch.equal(backend.pool.tensor, reference.pool.tensor)


def test_an_unknown_backend_is_named():
    pool = make_pair("reference", AttentionShape(1, 1, 8, 1.0), (1, 1, 2, 4, 8), 4)[0].pool
    with pytest.raises(UnsupportedConfig, match="'magic'"):
        make_backend("magic", AttentionShape(1, 1, 8, 1.0), pool)
