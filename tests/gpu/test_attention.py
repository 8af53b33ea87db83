"""FlashInfer's backend against the reference, in bfloat16: page sizes, head counts, ragged lengths, cached prefixes, captured batches."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from attention_batches import Row, make_batch, make_pools

from cache_store.keys import Layout
from workers.attention.base import AttentionBatch, AttentionShape, make_backend
from workers.kv.layout import PageLayout
from workers.kv.pool import PagePool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda", 0)
NUM_LAYERS = 3


def batch_of(rows: list[Row], block_size: int, num_pages: int, rng: np.random.RandomState) -> AttentionBatch:
    return make_batch(rows, block_size, range(1, num_pages), rng, CUDA)


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(actual.float()).all()
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert difference < 1.5e-2, f"relative difference {difference}"


BATCHES: list[list[Row]] = [
    [(0, 1)],
    [(17, 1), (300, 1), (5, 1)],
    [(0, 40)],
    [(64, 70), (0, 128)],
    [(15, 1), (16, 1), (0, 2), (33, 31), (128, 100)],
    [(1100, 5), (900, 33)],
    [(0, 700)],
    [(40, 1), (300, 900), (5, 1500)],
]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (8, 2, 64), (6, 6, 128)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_gqa(num_heads, num_kv_heads, head_dim, block_size):
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, head_dim**-0.5)
    fast, exact = make_pools((num_kv_heads, NUM_LAYERS, 2, block_size, head_dim), block_size, 256, "bfloat16", CUDA)
    backend, reference = make_backend("flashinfer", shape, fast), make_backend("reference", shape, exact)
    rng = np.random.RandomState(block_size)
    for rows in BATCHES:
        batch = batch_of(rows, block_size, 256, rng)
        backend.begin(batch)
        reference.begin(batch)
        for layer in range(NUM_LAYERS):
            q = torch.randn(batch.query_starts[-1], num_heads, head_dim, device=CUDA, dtype=torch.bfloat16)
            kv = torch.randn(batch.query_starts[-1], 2 * num_kv_heads, head_dim, device=CUDA, dtype=torch.bfloat16)
            for each in (backend, reference):
                each.write_gqa(layer, kv)
            near(backend.gqa(layer, q), reference.gqa(layer, q))
    assert torch.equal(fast.tensor, exact.tensor)


@pytest.mark.parametrize("num_heads", [4, 16])
def test_mla(num_heads, monkeypatch):
    """Both forms; the plain one also in many ranges of keys."""
    latent, rope, nope, value, block = 512, 64, 128, 128, 64
    shape = AttentionShape(num_heads, 1, 0, 0.1, latent)
    fast, exact = make_pools((NUM_LAYERS, block, latent + rope), block, 64, "bfloat16", CUDA)
    backend, reference = make_backend("flashinfer", shape, fast), make_backend("reference", shape, exact)
    rng = np.random.RandomState(num_heads)
    for rows, projected_bytes in itertools.product(BATCHES, (1 << 30, num_heads * 448 * 2 * 128)):
        monkeypatch.setattr("workers.attention.flashinfer_latent.PROJECTED_BYTES", projected_bytes)
        batch = batch_of(rows, block, 64, rng)
        split = batch.num_decode_rows + (1 if len(rows) > batch.num_decode_rows + 1 else 0)
        first_plain = batch.query_starts[split]
        up = torch.randn(num_heads * (nope + value), latent, device=CUDA, dtype=torch.bfloat16) * 0.05
        backend.begin(batch)
        reference.begin(batch)
        for layer in range(NUM_LAYERS):
            latents = torch.randn(batch.query_starts[-1], latent + rope, device=CUDA, dtype=torch.bfloat16)
            q = torch.randn(num_heads, first_plain, latent, device=CUDA, dtype=torch.bfloat16).transpose(0, 1)  # as a model has it
            q_rope = torch.randn(first_plain, num_heads, nope + rope, device=CUDA, dtype=torch.bfloat16)[..., nope:]
            plain_q = torch.randn(batch.query_starts[-1] - first_plain, num_heads, nope + rope, device=CUDA, dtype=torch.bfloat16)
            for each in (backend, reference):
                each.write_mla(layer, latents)
            if split:
                near(backend.mla_absorbed(layer, q, q_rope, range(split)), reference.mla_absorbed(layer, q, q_rope, range(split)))
            if split < len(rows):
                plain = range(split, len(rows))
                near(backend.mla_plain(layer, plain_q, up, value, plain), reference.mla_plain(layer, plain_q, up, value, plain))
    assert torch.equal(fast.tensor, exact.tensor)


@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "max_keys", "batches"),
    [
        (4, 4, 65536, [[(0, 1), (15, 1), (700, 1), (64, 1)], [(2000, 1)] * 3 + [(1, 1)], [(5, 1)] * 4]),
        (1, 96, 65536, [[(700, 96)], [(0, 5)], [(2000, 33)], [(0, 96)], [(17, 2)]]),
        (1, 96, 1024, [[(700, 96)], [(0, 5)], [(991, 33)], [(0, 96)], [(17, 2)]]),
        (1, 256, 1024, [[(700, 256)], [(0, 5)], [(768, 256)], [(0, 255)], [(300, 130)]]),
    ],
)
@pytest.mark.parametrize("is_mla", [False, True])
def test_captured_batches_follow_new_lengths(is_mla, num_rows, num_tokens, max_keys, batches):
    """One graph, replayed for other pages and lengths than it was captured with, and for fewer tokens of a prompt."""
    if is_mla:
        shape, page_shape, block = AttentionShape(16, 1, 0, 0.1, 512), (NUM_LAYERS, 64, 576), 64
        q = torch.randn(num_tokens, 16, 576, device=CUDA, dtype=torch.bfloat16)
    else:
        shape, page_shape, block = AttentionShape(32, 8, 128, 128**-0.5), (8, NUM_LAYERS, 2, 16, 128), 16
        q = torch.randn(num_tokens, 32, 128, device=CUDA, dtype=torch.bfloat16)
    fast, exact = make_pools(page_shape, block, 512, "bfloat16", CUDA)
    backend, reference = make_backend("flashinfer", shape, fast), make_backend("reference", shape, exact)

    def run(each, count=num_tokens):
        q_TND = q[:count]
        return each.mla_absorbed(1, q_TND[..., :512], q_TND[..., 512:], range(num_rows)) if is_mla else each.gqa(1, q_TND)

    def captured(rows: list[Row]) -> AttentionBatch:
        batch = batch_of(rows, block, 512, rng)
        pages = torch.zeros(num_tokens, dtype=torch.int64, device=CUDA)
        return dataclasses.replace(batch, pages=pages, captured_pages=max_keys // block)

    rng = np.random.RandomState(0)
    backend.reserve_graph(num_rows, num_tokens, max_keys // block)
    backend.begin_graph(captured([(0, num_tokens // num_rows)] * num_rows))
    run(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(backend)
    for rows in batches:
        batch = captured(rows)
        backend.begin_graph(batch)
        graph.replay()
        reference.begin(batch)
        count = batch.query_starts[-1]
        near(out[:count], run(reference, count))
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("is_mla", [False, True])
def test_pages_beyond_32_bits(is_mla):
    """Page numbers times page size pass 2^32 elements."""
    if is_mla:
        shape, page_shape, block = AttentionShape(16, 1, 0, 0.1, 512), (27, 64, 576), 64
    else:
        shape, page_shape, block = AttentionShape(32, 8, 128, 128**-0.5), (8, 32, 2, 16, 128), 16
    num_pages = 4400 if is_mla else 4200
    layout = PageLayout(Layout("any", 0, block, "bfloat16", 1, page_shape), 1, 0, page_shape, "bfloat16", 0, 1, 0, 1)
    pool = PagePool(layout, num_pages, CUDA)
    assert pool.tensor.numel() > 1 << 32
    rng = np.random.RandomState(1)
    high = list(range(num_pages - 40, num_pages))
    batch = make_batch([(100, 1), (30, 65)], block, high, rng, CUDA)
    pool.tensor[high] = torch.randn((len(high), *page_shape), device=CUDA).bfloat16()
    backend, reference = make_backend("flashinfer", shape, pool), make_backend("reference", shape, pool)
    for each in (backend, reference):
        each.begin(batch)
    if is_mla:
        q, rope = torch.randn(66, 16, 576, device=CUDA, dtype=torch.bfloat16).split([512, 64], dim=-1)
        near(backend.mla_absorbed(26, q, rope, range(2)), reference.mla_absorbed(26, q, rope, range(2)))
        up = torch.randn(16 * 256, 512, device=CUDA, dtype=torch.bfloat16) * 0.05
        plain = torch.randn(65, 16, 192, device=CUDA, dtype=torch.bfloat16)
        near(backend.mla_plain(26, plain, up, 128, range(1, 2)), reference.mla_plain(26, plain, up, 128, range(1, 2)))
    else:
        q = torch.randn(66, 32, 128, device=CUDA, dtype=torch.bfloat16)
        near(backend.gqa(31, q), reference.gqa(31, q))
        only_decode = dataclasses.replace(batch)
        backend.begin(only_decode)
        near(backend.gqa(31, q), reference.gqa(31, q))
