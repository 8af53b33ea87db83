"""Triton kernels against the same thing in plain torch, on random inputs, in float32 and bfloat16."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


def near(actual, expected, scale=1.0):
    difference = (actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6)
    assert torch.isfinite(actual.float()).all()
    assert difference < TOLERANCE[actual.dtype] * scale, f"relative difference {difference}"


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [160, 2048, 4096])
def test_norm_and_activation(dtype, size):
    from workers.kernels.norm import add_rms_norm, silu_mul

    x, delta, weight = randn(37, size, dtype=dtype), randn(37, size, dtype=dtype), randn(size, dtype=dtype)
    normed, total = add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    near(normed, F.rms_norm(total.float(), (size,), weight.float(), 1e-6))
    near(add_rms_norm(x, None, weight, 1e-6)[0], F.rms_norm(x.float(), (size,), weight.float(), 1e-6))
    gate, up = x.float().chunk(2, dim=1)
    near(silu_mul(x), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 64), (32, 8, 128)])
def test_gqa_rotation_and_writes(dtype, qk_norm, num_heads, num_kv_heads, head_dim):
    from workers.kernels.pages import rotate_and_write_gqa
    from workers.layers.rotary import rotate_

    tokens, block, layers = 21, 16, 3
    qkv = randn(tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    expected = qkv.float()
    rope = randn(tokens, 1, head_dim // 2, dtype=dtype), randn(tokens, 1, head_dim // 2, dtype=dtype)
    weights = randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype)
    pool = torch.zeros(40, num_kv_heads, layers, 2, block, head_dim, dtype=dtype, device="cuda")
    pages, offsets = torch.randperm(40, device="cuda")[:tokens], torch.randint(0, block, (tokens,), device="cuda")
    rotate_and_write_gqa(qkv, num_heads, rope, (*weights, 1e-6) if qk_norm else None, pool, 1, pages, offsets)
    if qk_norm:
        for part, weight in ((slice(0, num_heads), weights[0]), (slice(num_heads, num_heads + num_kv_heads), weights[1])):
            expected[:, part] = F.rms_norm(expected[:, part], (head_dim,), weight.float(), 1e-6)
    rotate_(expected[:, : num_heads + num_kv_heads], *(each.float() for each in rope))
    near(qkv[:, :num_heads], expected[:, :num_heads])
    keys, values = expected[:, num_heads:].split(num_kv_heads, dim=1)
    near(pool[pages, :, 1, 0, offsets], keys)
    near(pool[pages, :, 1, 1, offsets], values)
    assert not pool[:, :, 0].any()
    assert not pool[:, :, 2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_mla_rotation_and_writes(dtype, interleaved):
    from workers.kernels.pages import rotate_and_write_mla
    from workers.layers.rotary import rotate_, rotate_pairs

    tokens, heads, latent, half, nope, block = 19, 16, 512, 32, 128, 64
    q, page_rows = randn(tokens, heads, nope + 2 * half, dtype=dtype), randn(tokens, latent + 2 * half, dtype=dtype)
    expected_q, expected = q.float(), page_rows.float()
    weight, rope = randn(latent, dtype=dtype), (randn(tokens, 1, half, dtype=dtype), randn(tokens, 1, half, dtype=dtype))
    pool = torch.zeros(30, 3, block, latent + 2 * half, dtype=dtype, device="cuda")
    pages, offsets = torch.randperm(30, device="cuda")[:tokens], torch.randint(0, block, (tokens,), device="cuda")
    rotate_and_write_mla(q, page_rows, nope, rope, (weight, 1e-6), interleaved, pool, 2, pages, offsets)
    expected[:, :latent] = F.rms_norm(expected[:, :latent], (latent,), weight.float(), 1e-6)
    cos, sin = (each.float() for each in rope)
    for part in (expected_q[..., nope:], expected[:, latent:].unsqueeze(1)):
        if interleaved:
            part.copy_(rotate_pairs(part.clone(), cos, sin))
        else:
            rotate_(part, cos, sin)
    near(q, expected_q)
    near(pool[pages, 2, offsets], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 24])
def test_pages_are_copied_together(dtype, block):
    """Two rows, whose last pages are not full."""
    from workers.kernels.pages import gather_gqa

    pool = randn(12, 2, 3, 2, block, 64, dtype=dtype)
    rows = [([7, 2, 9], 2 * block + 5), ([4, 11, 1], 3 * block - 1)]
    starts, expected, first = [], [], 0
    for pages, length in rows:
        starts += range(first, first + length, block)
        expected.append(pool[pages, :, 1].permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :length])
        first += length
    keys, values = (torch.full((first + 1, 2, 64), 7.0, dtype=dtype, device="cuda") for _ in range(2))
    pages = torch.tensor([page for pages, _ in rows for page in pages], dtype=torch.int32, device="cuda")
    gather_gqa(pool, 1, pages, torch.tensor([*starts, first], dtype=torch.int32, device="cuda"), keys, values)
    for actual, wanted in zip((keys, values), torch.cat(expected, dim=1), strict=True):
        assert torch.equal(actual[:-1], wanted)
        assert (actual[-1] == 7).all()


def test_writes_reach_pages_beyond_32_bits():
    from workers.kernels.pages import rotate_and_write_gqa

    pool = torch.empty(5000, 8, 32, 2, 16, 128, dtype=torch.bfloat16, device="cuda")
    assert pool.numel() > 1 << 32
    qkv = randn(2, 16 + 16, 128, dtype=torch.bfloat16)
    one = torch.ones(2, 1, 64, dtype=torch.bfloat16, device="cuda")
    pages, offsets = torch.tensor([4999, 1], device="cuda"), torch.tensor([15, 3], device="cuda")
    values = qkv[:, 24:].clone()
    rotate_and_write_gqa(qkv, 16, (one, one * 0), None, pool, 31, pages, offsets)
    assert torch.equal(pool[pages, :, 31, 1, offsets], values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 33, 64])
@pytest.mark.parametrize("size", [(4096, 512), (176, 8000), (2048, 100)])
def test_products_of_few_tokens(dtype, num_tokens, size):
    from workers.kernels.linear import can_multiply, multiply

    num_inputs, num_outputs = size
    x = randn(num_tokens, 2 * num_inputs, dtype=dtype)[:, :num_inputs]
    weight, bias = randn(num_outputs, num_inputs, dtype=dtype) / num_inputs**0.5, randn(num_outputs, dtype=dtype)
    assert can_multiply(x, weight)
    expected = F.linear(x.float(), weight.float())
    near(multiply(x, weight, None), expected)
    exact = multiply(x, weight, bias, dtype=torch.float32)
    assert exact.dtype is torch.float32
    torch.testing.assert_close(exact, expected + bias.float(), rtol=1e-3, atol=1e-3)
    gate, up = (expected + bias.float()).chunk(2, dim=1)
    near(multiply(x, weight, bias, gated=True), F.silu(gate) * up)


@pytest.mark.parametrize("part_bytes", [1024, 1032, 73_728, 262_144])
def test_checksums(part_bytes):
    import numpy as np
    import xxhash

    from workers.kernels.checksum import PartHasher

    data = torch.randint(0, 256, (part_bytes * 9,), dtype=torch.uint8, device="cuda")
    hasher, places = PartHasher(data, part_bytes, 6), np.array([0, 8, 3, 5, 1], np.int64) * part_bytes
    hasher.put(places)
    hasher.start(0, 3)
    hasher.start(3, 5)
    torch.cuda.synchronize()
    host = data.cpu().numpy()
    expected = [xxhash.xxh3_64_intdigest(host[place : place + part_bytes].tobytes()) for place in places]
    assert hasher.finish(5).tolist() == expected


@pytest.mark.parametrize("num_tokens", [1, 64, 65])
@pytest.mark.parametrize("stored", DTYPES)
def test_scores_of_experts(num_tokens, stored):
    from workers.kernels.experts import bfloat16_terms, score_experts

    x, weight = randn(num_tokens, 1100, dtype=torch.bfloat16), randn(72, 1100, dtype=stored).float()
    terms = bfloat16_terms(weight)
    assert torch.equal(terms.double().unflatten(0, (-1, 72)).sum(0), weight.double())
    assert len(terms) == (72 if stored is torch.bfloat16 else 3 * 72)
    expected = (x.double() @ weight.double().T).float()
    for actual in (score_experts(x, weight), score_experts(x, weight, terms)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_keys_are_joined_of_their_two_parts():
    from workers.kernels.pages import join_keys

    up, rope = randn(37, 5, 256, dtype=torch.bfloat16), randn(37, 576, dtype=torch.bfloat16)[:, 512:]
    keys = join_keys(up[..., :128], rope)
    assert torch.equal(keys, torch.cat((up[..., :128], rope.unsqueeze(1).expand(-1, 5, -1)), dim=2))


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize(("num_groups", "kept", "num_experts", "chosen"), [(1, 1, 64, 6), (8, 4, 256, 8)])
def test_choice_of_experts(sigmoid, num_groups, kept, num_experts, chosen):
    from workers.kernels.experts import choose_experts

    logits = randn(300, num_experts)
    bias = randn(num_experts) * 0.2 if sigmoid else None
    experts, weights = choose_experts(
        logits, bias, chosen, num_groups=num_groups, num_kept_groups=kept, sigmoid=sigmoid, normalise=sigmoid, scale=2.5
    )
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if num_groups > 1:
        grouped = choice.unflatten(1, (num_groups, -1))
        best = grouped.topk(2, -1).values.sum(-1) if sigmoid else grouped.amax(-1)
        dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(kept, -1).indices, False)
        choice = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)
    expected = choice.topk(chosen, -1).indices
    assert torch.equal(experts.long().sort(-1).values, expected.sort(-1).values)
    exact = scores.gather(1, experts.long())
    if sigmoid:
        exact = exact / (exact.sum(-1, keepdim=True) + 1e-20)
    torch.testing.assert_close(weights, exact * 2.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 3000])
def test_experts(dtype, num_tokens):
    from workers.kernels.experts import group_pairs, run_experts, run_streamed, usual_tiles

    hidden, size, num_experts, chosen = 256, 176, 16, 3
    x, shared = randn(num_tokens, hidden, dtype=dtype), randn(num_tokens, hidden, dtype=dtype)
    gate_up, down = randn(num_experts, 2 * size, hidden, dtype=dtype) * 0.06, randn(num_experts, hidden, size, dtype=dtype) * 0.07
    experts = torch.rand(num_tokens, num_experts, device="cuda").topk(chosen, -1).indices.int()
    weights = torch.rand(num_tokens, chosen, device="cuda")
    order, starts = group_pairs(experts, num_experts)
    assert torch.equal(order.long(), experts.flatten().argsort(stable=True))
    assert starts.tolist() == [0, *torch.bincount(experts.flatten(), minlength=num_experts).cumsum(0).tolist()]
    out = run_experts(x, experts, weights, gate_up, down, lambda: shared)
    expected = shared.float().clone()
    for expert in range(num_experts):
        token, rank = (experts == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ gate_up[expert].float().T).chunk(2, dim=1)
        expected.index_add_(0, token, weights[token, rank][:, None] * ((F.silu(gate) * up) @ down[expert].float().T))
    scale = 3.0 if dtype is torch.float32 else 1.0  # tensor cores multiply float32 as tf32
    near(out, expected, scale=scale)
    for pairs_per_expert in (1, 20, 80):
        tiles = usual_tiles(pairs_per_expert, dtype)
        near(run_streamed(x, experts, weights, gate_up, down, lambda: shared, tiles), expected, scale=scale)


def test_rows_of_nan_choose_what_there_is():
    """Of what they choose nothing is kept, but it is looked up: padding behind the last expert or token must not be."""
    from workers.kernels.experts import choose_experts
    from workers.kernels.sampling import draw

    logits = torch.full((8, 160), float("nan"), device="cuda")
    experts, _ = choose_experts(logits, None, 6, num_groups=8, num_kept_groups=3, sigmoid=False, normalise=False, scale=1.0)
    assert (experts.min() >= 0) & (experts.max() < 160)
    for temperature in (0.0, 1.0):
        tokens = draw(logits, torch.full((8,), temperature, device="cuda"), torch.zeros((8, 2), dtype=torch.int32, device="cuda"))
        assert (tokens.min() >= 0) & (tokens.max() < 160)


def test_draws_are_those_of_the_cpu():
    from workers.sampler import Draws, draw

    logits, positions = torch.randn(64, 50_000) * 3, torch.arange(64, dtype=torch.int32)
    seeds = torch.randint(-(2**31), 2**31 - 1, (64, 2), dtype=torch.int32)
    temperature = torch.rand(64) * 2
    temperature[::7] = 0.0
    plain = Draws(temperature, torch.zeros(64), torch.ones(64), torch.zeros(64, dtype=torch.int64), seeds, positions, 0, False, False)
    filtered = plain._replace(top_k=torch.full((64,), 40), max_top_k=40, top_p=torch.full((64,), 0.9), any_top_p=True)
    for draws in (plain, filtered):
        on_device = Draws(*(value.cuda() if isinstance(value, torch.Tensor) else value for value in draws))
        table = torch.stack([on_device.temperature, *[torch.ones_like(on_device.temperature)] * 5], dim=1)
        on_device = on_device._replace(temperature=table[:, 0])  # a column, as a batch has it
        same = draw(logits.cuda(), on_device).cpu() == draw(logits, draws)
        assert same.float().mean() > 0.98  # a logarithm may round otherwise, and decide between two tokens
