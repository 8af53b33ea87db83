"""Rotates queries and keys and writes keys and values into their pages, in one pass; and gathers what attention reads at once.

T tokens, M heads of queries, keys and values, D dimensions of a head, R = D / 2 frequencies, N query heads, C latent, P = latent + rope.
Offsets into the pool are 64 bits wide: a pool has more than 2^32 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HEADS = 8  # of one program


@triton.jit(do_not_specialize_on_alignment=["pages_ptr", "offsets_ptr"])  # slices of one buffer
def _rotate_and_write_gqa(
    qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, pool_ptr, pages_ptr, offsets_ptr,
    qkv_stride, page_stride, head_stride, layer_offset, value_offset, num_heads, num_kv_heads, eps,
    HAS_NORM: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (head < num_heads + 2 * num_kv_heads)[:, None]
    half = tl.arange(0, R)
    source = qkv_ptr + token * qkv_stride + head[:, None] * D + half[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + R, mask=inside, other=0.0).to(tl.float32)
    is_query = (head < num_heads)[:, None]
    is_value = (head >= num_heads + num_kv_heads)[:, None]
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        q_first, q_second = tl.load(q_weight_ptr + half).to(tl.float32), tl.load(q_weight_ptr + R + half).to(tl.float32)
        k_first, k_second = tl.load(k_weight_ptr + half).to(tl.float32), tl.load(k_weight_ptr + R + half).to(tl.float32)
        first = tl.where(is_value, first, first * scale * tl.where(is_query, q_first[None, :], k_first[None, :]))
        second = tl.where(is_value, second, second * scale * tl.where(is_query, q_second[None, :], k_second[None, :]))
    cos = tl.load(cos_ptr + token * R + half).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * R + half).to(tl.float32)[None, :]
    out_first = tl.where(is_value, first, first * cos - second * sin)
    out_second = tl.where(is_value, second, second * cos + first * sin)
    tl.store(source, out_first.to(qkv_ptr.dtype.element_ty), mask=is_query)
    tl.store(source + R, out_second.to(qkv_ptr.dtype.element_ty), mask=is_query)
    page, offset = tl.load(pages_ptr + token).to(tl.int64), tl.load(offsets_ptr + token)
    kv_head = tl.where(head >= num_heads + num_kv_heads, head - num_heads - num_kv_heads, head - num_heads)
    start = page * page_stride + layer_offset + offset * D
    where_to = start + kv_head[:, None] * head_stride + tl.where(is_value, value_offset, 0) + half[None, :]
    writes = inside & (is_query == 0)
    tl.store(pool_ptr + where_to, out_first.to(pool_ptr.dtype.element_ty), mask=writes)
    tl.store(pool_ptr + where_to + R, out_second.to(pool_ptr.dtype.element_ty), mask=writes)


def rotate_and_write_gqa(
    qkv_TMD: torch.Tensor,
    num_heads: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    pool: torch.Tensor,
    layer: int,
    pages_T: torch.Tensor,
    offsets_T: torch.Tensor,
) -> None:
    """Norms (`norms`: weights of queries and keys, eps) and rotates queries in place; keys and values go to `pool`
    [pages, K, layers, 2, block, D]."""
    num_tokens, num_all, head_dim = qkv_TMD.shape
    num_kv_heads = (num_all - num_heads) // 2
    q_weight, k_weight, eps = norms or (qkv_TMD, qkv_TMD, 0.0)
    _rotate_and_write_gqa[(num_tokens, triton.cdiv(num_all, _HEADS))](
        qkv_TMD, *rope, q_weight, k_weight, pool, pages_T, offsets_T,
        qkv_TMD.stride(0), pool.stride(0), pool.stride(1), layer * pool.stride(2), pool.stride(3), num_heads, num_kv_heads, eps,
        HAS_NORM=norms is not None, D=head_dim, HEADS=_HEADS, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["pages_ptr"])
def _gather_gqa(
    pool_ptr, pages_ptr, starts_ptr, keys_ptr, values_ptr, page_stride, head_stride, layer_offset, value_offset, token_stride,
    block_size, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    index, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(starts_ptr + index)
    count = tl.minimum(tl.load(starts_ptr + index + 1) - first, block_size)
    token, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, D)[None, :]
    inside = token < count
    page = tl.load(pages_ptr + index).to(tl.int64)
    source = pool_ptr + page * page_stride + head * head_stride + layer_offset + token * D + column
    target = (first.to(tl.int64) + token) * token_stride + head * D + column
    tl.store(keys_ptr + target, tl.load(source, mask=inside), mask=inside)
    tl.store(values_ptr + target, tl.load(source + value_offset, mask=inside), mask=inside)


def gather_gqa(
    pool: torch.Tensor, layer: int, pages: torch.Tensor, starts: torch.Tensor, keys_SKD: torch.Tensor, values_SKD: torch.Tensor
) -> None:
    """Copies one layer's keys and values of `pages` out of `pool` [pages, K, layers, 2, block, D], those of page i to tokens
    [starts[i], starts[i + 1])."""
    num_kv_heads, block_size, head_dim = pool.shape[1], pool.shape[4], pool.shape[5]
    _gather_gqa[(len(pages), num_kv_heads)](
        pool, pages, starts, keys_SKD, values_SKD, pool.stride(0), pool.stride(1), layer * pool.stride(2), pool.stride(3),
        num_kv_heads * head_dim, block_size, BLOCK=triton.next_power_of_2(block_size), D=head_dim, num_warps=4,
    )  # fmt: skip


@triton.jit
def _join_keys(
    nope_ptr, rope_ptr, keys_ptr, nope_stride, nope_head_stride, rope_stride, num_heads,
    D: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    inside = head < num_heads
    nope_column, rope_column = tl.arange(0, D)[None, :], tl.arange(0, R)[None, :]
    nope = tl.load(nope_ptr + token * nope_stride + head * nope_head_stride + nope_column, mask=inside)
    rope = tl.load(rope_ptr + token * rope_stride + rope_column + 0 * head, mask=inside)
    target = keys_ptr + (token * num_heads + head) * (D + R)
    tl.store(target + nope_column, nope, mask=inside)
    tl.store(target + D + rope_column, rope, mask=inside)


def join_keys(nope_SND: torch.Tensor, rope_SR: torch.Tensor) -> torch.Tensor:
    """Keys [S, N, D + R] whose last dimensions all heads share. D and R are powers of two."""
    num_tokens, num_heads, nope_dim = nope_SND.shape
    rope_dim = rope_SR.shape[1]
    keys = torch.empty((num_tokens, num_heads, nope_dim + rope_dim), dtype=nope_SND.dtype, device=nope_SND.device)
    _join_keys[(num_tokens,)](
        nope_SND, rope_SR, keys, nope_SND.stride(0), nope_SND.stride(1), rope_SR.stride(0), num_heads,
        D=nope_dim, R=rope_dim, HEADS=triton.next_power_of_2(num_heads), num_warps=4,
    )  # fmt: skip
    return keys


@triton.jit(do_not_specialize_on_alignment=["pages_ptr", "offsets_ptr"])
def _rotate_and_write_mla(
    q_ptr, latent_ptr, cos_ptr, sin_ptr, weight_ptr, pool_ptr, pages_ptr, offsets_ptr,
    q_stride, q_head_stride, latent_stride, page_stride, layer_offset, num_heads, nope_dim, eps,
    INTERLEAVED: tl.constexpr, C: tl.constexpr, C_BLOCK: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, R)
    cos = tl.load(cos_ptr + token * R + half).to(tl.float32)
    sin = tl.load(sin_ptr + token * R + half).to(tl.float32)
    if INTERLEAVED:
        first_in, second_in = 2 * half, 2 * half + 1
    else:
        first_in, second_in = half, half + R
    if tl.program_id(1) == 0:
        page, offset = tl.load(pages_ptr + token).to(tl.int64), tl.load(offsets_ptr + token)
        target = pool_ptr + page * page_stride + layer_offset + offset * (C + 2 * R)
        source = latent_ptr + token * latent_stride
        columns = tl.arange(0, C_BLOCK)
        inside = columns < C
        latent = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        normed = latent * tl.rsqrt(tl.sum(latent * latent, 0) / C + eps) * weight
        tl.store(target + columns, normed.to(pool_ptr.dtype.element_ty), mask=inside)
        key_first = tl.load(source + C + first_in).to(tl.float32)
        key_second = tl.load(source + C + second_in).to(tl.float32)
        tl.store(target + C + half, (key_first * cos - key_second * sin).to(pool_ptr.dtype.element_ty))
        tl.store(target + C + R + half, (key_second * cos + key_first * sin).to(pool_ptr.dtype.element_ty))
    else:
        head = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        inside_heads = (head < num_heads)[:, None]
        rope_start = q_ptr + token * q_stride + head[:, None] * q_head_stride + nope_dim
        first = tl.load(rope_start + first_in[None, :], mask=inside_heads, other=0.0).to(tl.float32)
        second = tl.load(rope_start + second_in[None, :], mask=inside_heads, other=0.0).to(tl.float32)
        tl.debug_barrier()  # pairs become halves in place: everything is read before anything is written
        out_first = first * cos[None, :] - second * sin[None, :]
        out_second = second * cos[None, :] + first * sin[None, :]
        tl.store(rope_start + half[None, :], out_first.to(q_ptr.dtype.element_ty), mask=inside_heads)
        tl.store(rope_start + R + half[None, :], out_second.to(q_ptr.dtype.element_ty), mask=inside_heads)


def rotate_and_write_mla(
    q_TND: torch.Tensor,
    latent_TP: torch.Tensor,
    nope_dim: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    norm: tuple[torch.Tensor, float],
    interleaved: bool,
    pool: torch.Tensor,
    layer: int,
    pages_T: torch.Tensor,
    offsets_T: torch.Tensor,
) -> None:
    """Rotates the rope part of queries in place; normed latents with rotated keys behind them go to `pool` [pages, layers, block, P]."""
    num_tokens, num_heads, _ = q_TND.shape
    weight_C, eps = norm
    latent_dim = len(weight_C)
    _rotate_and_write_mla[(num_tokens, 1 + triton.cdiv(num_heads, _HEADS))](
        q_TND, latent_TP, *rope, weight_C, pool, pages_T, offsets_T,
        q_TND.stride(0), q_TND.stride(1), latent_TP.stride(0), pool.stride(0), layer * pool.stride(1), num_heads, nope_dim, eps,
        INTERLEAVED=interleaved, C=latent_dim, C_BLOCK=triton.next_power_of_2(latent_dim), R=(pool.shape[-1] - latent_dim) // 2,
        HEADS=_HEADS, num_warps=4,
    )  # fmt: skip
