"""What the FlashInfer backend plans and runs, over wrappers in plain torch, against the reference. tests/gpu has the real ones."""

import dataclasses
import sys
import types

import numpy as np
import pytest
import torch
from attention_batches import Row, make_batch, make_pools

from tests.workers import fake_flashinfer
from workers.attention import flashinfer_gqa, flashinfer_latent, flashinfer_wrappers
from workers.attention.base import AttentionBatch, AttentionShape, make_backend
from workers.attention.flashinfer import FlashInferAttention

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUM_LAYERS, NUM_PAGES = 2, 64
CPU = torch.device("cpu")
BATCHES: list[list[Row]] = [
    [(0, 1)],
    [(17, 1), (300, 1), (5, 1)],
    [(0, 40)],
    [(64, 70), (0, 128)],
    [(15, 1), (16, 1), (0, 2), (33, 31), (128, 100)],
    [(310, 5), (90, 33)],
]


@pytest.fixture(autouse=True)
def library(monkeypatch):
    fake_flashinfer.install(monkeypatch)
    monkeypatch.setattr(flashinfer_wrappers, "WORKSPACE_BYTES", 1024)
    monkeypatch.setattr(FlashInferAttention, "_check", lambda self: None)  # there is no CUDA device


def planned() -> list[str]:
    """Since the last call."""
    names = list(fake_flashinfer.planned_in)
    fake_flashinfer.planned_in.clear()
    return names


def batch_of(rows: list[Row], block_size: int, rng: np.random.RandomState) -> AttentionBatch:
    return make_batch(rows, block_size, range(1, NUM_PAGES), rng)


def pair(shape: AttentionShape, page_shape: tuple[int, ...], block_size: int):
    """The backend and the reference, over pools of the same content."""
    pools = make_pools(page_shape, block_size, NUM_PAGES, "float32", CPU)
    return make_backend("flashinfer", shape, pools[0]), make_backend("reference", shape, pools[1])


def gqa_pair(block_size: int = 16, window: int | None = None):
    return pair(AttentionShape(8, 2, 64, 64**-0.5, window=window), (2, NUM_LAYERS, 2, block_size, 64), block_size)


def latent_pair():
    return pair(AttentionShape(4, 1, 0, 0.1, 512), (NUM_LAYERS, 64, 576), 64)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("block_size", [16, 32])
def test_gqa(block_size, window):
    backend, reference = gqa_pair(block_size, window)
    rng = np.random.RandomState(block_size)
    torch.manual_seed(0)
    for rows in BATCHES:
        batch = batch_of(rows, block_size, rng)
        for each in (backend, reference):
            each.begin(batch)
        for layer in range(NUM_LAYERS):
            q, kv = torch.randn(batch.query_starts[-1], 8, 64), torch.randn(batch.query_starts[-1], 4, 64)
            for each in (backend, reference):
                each.write_gqa(layer, kv)
            close(backend.gqa(layer, q), reference.gqa(layer, q))
    assert torch.equal(backend.pool.tensor, reference.pool.tensor)


@pytest.mark.parametrize(
    ("rows", "gather_queries", "expected"),
    [
        ([(40, 1), (3, 1)], 512, ["decode"]),
        ([(40, 1), (3, 30)], 512, ["decode", "paged fa3"]),
        ([(40, 1), (300, 8)], 512, ["decode", "paged fa2"]),  # few queries over many keys: only fa2 splits the keys
        ([(40, 1), (300, 8), (0, 200)], 512, ["decode", "paged fa3"]),
        ([(40, 1), (100, 20), (0, 100)], 16, ["decode", "ragged"]),  # many queries a key: these are copied together first
    ],
)
def test_which_kernel_takes_which_rows(monkeypatch, rows, gather_queries, expected):
    monkeypatch.setattr(flashinfer_gqa, "SPLIT_KEYS", 256)
    monkeypatch.setattr(flashinfer_gqa, "GATHER_QUERIES", gather_queries)
    backend, reference = gqa_pair()
    batch = batch_of(rows, 16, np.random.RandomState(0))
    planned()
    for each in (backend, reference):
        each.begin(batch)
    assert planned() == expected
    q = torch.randn(batch.query_starts[-1], 8, 64)
    close(backend.gqa(1, q), reference.gqa(1, q))


@pytest.mark.parametrize("projected_bytes", [1 << 30, 4 * 448 * 4 * 128])
def test_latents(monkeypatch, projected_bytes):
    """Both forms; the plain one also over many ranges of keys."""
    monkeypatch.setattr(flashinfer_latent, "PROJECTED_BYTES", projected_bytes)
    backend, reference = latent_pair()
    rng = np.random.RandomState(1)
    torch.manual_seed(1)
    for rows in BATCHES:
        batch = batch_of(rows, 64, rng)
        num_absorbed = batch.num_decode_rows + (len(rows) > batch.num_decode_rows + 1)
        first_plain, num_tokens = batch.query_starts[num_absorbed], batch.query_starts[-1]
        up = torch.randn(4 * 256, 512) * 0.05
        for each in (backend, reference):
            each.begin(batch)
        for layer in range(NUM_LAYERS):
            latents = torch.randn(num_tokens, 576)
            q, q_rope, plain = (
                torch.randn(first_plain, 4, 512),
                torch.randn(first_plain, 4, 64),
                torch.randn(num_tokens - first_plain, 4, 192),
            )
            for each in (backend, reference):
                each.write_mla(layer, latents)
            absorbed, rest = range(num_absorbed), range(num_absorbed, len(rows))
            if absorbed:
                close(backend.mla_absorbed(layer, q, q_rope, absorbed), reference.mla_absorbed(layer, q, q_rope, absorbed))
            if rest:
                close(backend.mla_plain(layer, plain, up, 128, rest), reference.mla_plain(layer, plain, up, 128, rest))
    assert torch.equal(backend.pool.tensor, reference.pool.tensor)


@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "first", "max_keys", "expected"),
    [
        (4, 4, [(0, 1)] * 4, 2048, "decode"),
        (1, 32, [(0, 32)], 2048, "paged fa2 captured"),
        (1, 32, [(0, 32)], 1024, "paged fa3 captured"),  # the other one would split even few keys
    ],
)
def test_captured_batches(is_latent, num_rows, num_tokens, first, max_keys, expected):
    """As a graph would run them: on all tokens, whatever the batch has."""
    backend, reference = latent_pair() if is_latent else gqa_pair()
    block_size = 64 if is_latent else 16
    rng = np.random.RandomState(2)
    max_pages = max_keys // block_size
    backend.reserve_graph(num_rows, num_tokens, max_pages)
    q = torch.randn(num_tokens, 4, 576) if is_latent else torch.randn(num_tokens, 8, 64)

    def run(each, count=num_tokens):
        part = q[:count]
        return each.mla_absorbed(1, part[..., :512], part[..., 512:], range(num_rows)) if is_latent else each.gqa(1, part)

    decode = [[(15, 1), (300, 1), (64, 1), (0, 1)], [(5, 1)] * 4]
    for rows in [first, *(decode if num_rows > 1 else [[(300, 5)], [(0, 32)], [(17, 2)]])]:
        pages = torch.zeros(num_tokens, dtype=torch.int64)
        batch = dataclasses.replace(batch_of(rows, block_size, rng), pages=pages, captured_pages=max_pages)
        planned()
        backend.begin_graph(batch)
        assert planned() == ["latent captured" if is_latent else expected]
        reference.begin(batch)
        count = batch.query_starts[-1]
        out = run(backend)
        close(out[:count], run(reference, count))
        assert torch.isfinite(out).all(), "padding goes on through the layers, and must not become NaN"


def test_each_plan_stages_its_numbers_where_the_one_before_did_not():
    backend, _ = gqa_pair()
    batch = batch_of([(40, 1)], 16, np.random.RandomState(3))
    places = []
    for _ in range(4):
        backend.begin(batch)
        places.append(backend._gqa._decode.wrapper._pin_memory_int_workspace_buffer.data_ptr())
    assert places[0] == places[2] != places[1] == places[3]


@pytest.mark.parametrize("make", [gqa_pair, latent_pair])
def test_every_kernel_is_planned_ahead(monkeypatch, make):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    backend, _ = make()
    seen = []
    planned()
    backend.build(lambda *progress: seen.append(progress))
    assert sorted(planned()) == (["latent", "ragged"] if make is latent_pair else ["decode", "paged fa2", "paged fa3"])
    assert seen == [("kernels", done, len(seen) - 1) for done in range(len(seen))]


def test_the_longest_row_is_found_in_one_operation(monkeypatch):
    """The library's own modules get a `max` for tensors, which is as before for everything else."""
    module = types.ModuleType("flashinfer.decode")
    exec("def longest(lengths):\n    return max(lengths).item(), max(3, 5), max([2, 1], key=lambda x: -x)", module.__dict__)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module)
    gqa_pair()
    compared = []
    monkeypatch.setattr(torch.Tensor, "__gt__", lambda *_: compared.append(1))
    assert module.longest(torch.tensor([4, 9, 2], dtype=torch.int32)) == (9, 5, 1)
    assert not compared
