"""Mixture of experts on the GPU: choosing experts, grouping tokens by expert, and two grouped matrix products. No wait for the device.

    logits [T, E] --choose--> experts, weights [T, K] --group--> pairs sorted by expert --gate_up, silu--> [T*K, I] --down--> [T*K, H] --sum

A pair is one token at one expert, numbered token * K + k. For few pairs per expert a program of a grouped product owns one expert and some
output columns and walks over the expert's pairs: weights are streamed once, which is all that matters then. For many, the products are
torch's grouped_mm over tokens gathered in the order of experts.

T tokens, H hidden, E experts, G groups of experts, K experts per token, I intermediate, P = T * K pairs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl

from workers.kernels.norm import silu_mul

Shared = Callable[[], torch.Tensor] | None


class Tile(NamedTuple):
    """What one program of a grouped product holds at once: pairs and output columns, and of the inner dimension what it loads together.
    Neighbouring programs share an expert."""

    pairs: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int

    def grid(self, num_experts: int, num_columns: int) -> tuple[int, int]:
        return triton.cdiv(num_columns, self.columns), num_experts

    def options(self) -> dict[str, int]:
        return {
            "PAIRS": self.pairs,
            "COLUMNS": self.columns,
            "INNER": self.inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


_GROUP_BLOCK = 1024
_MAX_GROUPED_PAIRS = 8192  # beyond, a sort is faster than a pass per expert
_MANY_PAIRS = 96  # per expert
_MAX_SCORED_TOKENS = 64  # beyond, a matrix product that reads the weights once is faster
_SCORED_EXPERTS = 4  # of one program
_MAX_TERMS = 3  # of 8 bits each: float32 has 24


@triton.jit
def _score(x_ptr, weight_ptr, out_ptr, H, E, x_stride, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    acc = tl.zeros((EXPERTS, BLOCK), tl.float32)
    for start in range(0, H, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * x_stride + at, mask=at < H, other=0.0).to(tl.float32)
        inside = (expert < E)[:, None] & (at < H)[None, :]
        acc += x[None, :] * tl.load(weight_ptr + expert[:, None] * H + at[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + token * E + expert, tl.sum(acc, 1), mask=expert < E)


def bfloat16_terms(weight_EH: torch.Tensor) -> torch.Tensor:
    """A float32 weight as a sum of up to three bfloat16 ones [n * E, H], which is exact: one where a checkpoint in bfloat16 had it."""
    terms = [weight_EH.bfloat16()]
    rest_EH = weight_EH - terms[0].float()
    while len(terms) < _MAX_TERMS and rest_EH.any():
        terms.append(rest_EH.bfloat16())
        rest_EH = rest_EH - terms[-1].float()
    return torch.cat(terms)


def score_experts(x_TH: torch.Tensor, weight_EH: torch.Tensor, terms: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [T, E] in float32, products and sums too. `terms`: `bfloat16_terms` of the weight; tensor cores multiply these exactly."""
    (num_tokens, hidden), num_experts = x_TH.shape, len(weight_EH)
    if num_tokens > _MAX_SCORED_TOKENS:
        if terms is None or x_TH.dtype is not torch.bfloat16:
            return F.linear(x_TH.float(), weight_EH)
        logits = torch.mm(x_TH, terms.t(), out_dtype=torch.float32)
        return logits if len(terms) == num_experts else logits.view(num_tokens, -1, num_experts).sum(1)
    out_TE = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=x_TH.device)
    _score[(num_tokens, triton.cdiv(num_experts, _SCORED_EXPERTS))](
        x_TH, weight_EH, out_TE, hidden, num_experts, x_TH.stride(0), EXPERTS=_SCORED_EXPERTS, BLOCK=1024, num_warps=8
    )
    return out_TE


@triton.jit
def _choose(
    logits_ptr, bias_ptr, experts_ptr, weights_ptr, scale,
    E: tl.constexpr, E_BLOCK: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, E_BLOCK)
    inside = expert < E
    logits = tl.load(logits_ptr + token * E + expert, mask=inside, other=float("-inf"))
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=inside, other=0.0)
    choice = tl.where(inside, choice, float("-inf"))
    if G > 1:
        group = expert // (E // G)
        group_ids = tl.arange(0, triton.next_power_of_2(G))
        of_group = (group[:, None] == group_ids[None, :]) & inside[:, None]
        by_group = tl.where(of_group, choice[:, None], float("-inf"))
        best = tl.max(by_group, 0)
        if HAS_BIAS:  # DeepSeek V3: the sum of the best two; V2: the best
            at = tl.argmax(by_group, 0)
            best += tl.max(tl.where(expert[:, None] == at[None, :], float("-inf"), by_group), 0)
        best = tl.where(group_ids < G, best, float("-inf"))
        kept = tl.zeros((E_BLOCK,), tl.int32)
        for _ in tl.static_range(KEPT):
            chosen = tl.argmax(best, 0)
            kept = tl.where(group == chosen, 1, kept)
            best = tl.where(group_ids == chosen, float("-inf"), best)
        choice = tl.where(kept == 1, choice, float("-inf"))
    total = 0.0
    for k in tl.static_range(K):
        chosen = tl.minimum(tl.argmax(choice, 0), E - 1)  # NaN, of a row that counts for nothing, loses against the padding behind the last
        weight = tl.sum(tl.where(expert == chosen, scores, 0.0), 0)
        total += weight
        tl.store(experts_ptr + token * K + k, chosen)
        tl.store(weights_ptr + token * K + k, weight * scale)
        choice = tl.where(expert == chosen, float("-inf"), choice)
    if NORMALISE:
        for k in tl.static_range(K):
            weight = tl.load(weights_ptr + token * K + k)
            tl.store(weights_ptr + token * K + k, weight / (total + 1e-20))


def choose_experts(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    num_chosen: int,
    *,
    num_groups: int,
    num_kept_groups: int,
    sigmoid: bool,
    normalise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts (int32) and weights (float32), [T, K] each, from float32 logits, as `workers.layers.moe.Router` does."""
    num_tokens, num_experts = logits_TE.shape
    experts_TK = torch.empty((num_tokens, num_chosen), dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty((num_tokens, num_chosen), dtype=torch.float32, device=logits_TE.device)
    _choose[(num_tokens,)](
        logits_TE, logits_TE if bias_E is None else bias_E, experts_TK, weights_TK, scale,
        E=num_experts, E_BLOCK=triton.next_power_of_2(num_experts), G=num_groups, KEPT=num_kept_groups, K=num_chosen,
        SIGMOID=sigmoid, HAS_BIAS=bias_E is not None, NORMALISE=normalise, num_warps=1,
    )  # fmt: skip
    return experts_TK, weights_TK


@triton.jit(do_not_specialize=["num_pairs"])
def _group(experts_ptr, order_ptr, starts_ptr, num_pairs, BLOCK: tl.constexpr):
    mine = tl.program_id(0)
    lower = 0
    for start in range(0, num_pairs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        experts = tl.load(experts_ptr + index, mask=index < num_pairs, other=1 << 30)
        lower += tl.sum((experts < mine).to(tl.int32), 0)
    tl.store(starts_ptr + mine, lower)
    filled = lower
    for start in range(0, num_pairs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        experts = tl.load(experts_ptr + index, mask=index < num_pairs, other=1 << 30)
        hit = (experts == mine).to(tl.int32)
        tl.store(order_ptr + filled + tl.cumsum(hit, 0) - 1, index, mask=hit == 1)
        filled += tl.sum(hit, 0)
    if mine == tl.num_programs(0) - 1:
        tl.store(starts_ptr + mine + 1, num_pairs)


def group_pairs(experts_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in the order of their experts [P], and where each expert's begin [E + 1]; int32."""
    num_pairs = experts_TK.numel()
    if num_pairs <= _MAX_GROUPED_PAIRS:
        order_P = torch.empty(num_pairs, dtype=torch.int32, device=experts_TK.device)
        starts = torch.empty(num_experts + 1, dtype=torch.int32, device=experts_TK.device)
        block = min(_GROUP_BLOCK, triton.next_power_of_2(num_pairs))
        _group[(num_experts,)](experts_TK, order_P, starts, num_pairs, BLOCK=block, num_warps=max(1, block // 256))
        return order_P, starts
    ranked_P, order_P = experts_TK.flatten().sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=experts_TK.device)
    return order_P.int(), torch.searchsorted(ranked_P, bounds, out_int32=True)


@triton.jit
def _gate_up(
    x_ptr, weight_ptr, order_ptr, starts_ptr, out_ptr, H, I, K,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    start, stop = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < I
    inner = tl.arange(0, INNER)
    gate_base = weight_ptr + expert * 2 * I * H + column.to(tl.int64) * H
    up_base = gate_base + I.to(tl.int64) * H
    for first in range(start, stop, PAIRS):
        row = first + tl.arange(0, PAIRS)
        is_row = row < stop
        token = tl.load(order_ptr + row, mask=is_row, other=0) // K
        x_base = x_ptr + token.to(tl.int64) * H
        gate = tl.zeros((PAIRS, COLUMNS), tl.float32)
        up = tl.zeros((PAIRS, COLUMNS), tl.float32)
        for begin in range(0, H, INNER):
            at = begin + inner
            x = tl.load(x_base[:, None] + at[None, :], mask=is_row[:, None] & (at < H)[None, :], other=0.0)
            is_weight = is_column[None, :] & (at < H)[:, None]
            gate = tl.dot(x, tl.load(gate_base[None, :] + at[:, None], mask=is_weight, other=0.0), gate, input_precision="ieee")
            up = tl.dot(x, tl.load(up_base[None, :] + at[:, None], mask=is_weight, other=0.0), up, input_precision="ieee")
        out = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
        target = out_ptr + row.to(tl.int64) * I
        tl.store(target[:, None] + column[None, :], out, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _down(
    x_ptr, weight_ptr, order_ptr, starts_ptr, scale_ptr, out_ptr, H, I,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    start, stop = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < H
    inner = tl.arange(0, INNER)
    base = weight_ptr + expert * H * I + column.to(tl.int64) * I
    for first in range(start, stop, PAIRS):
        row = first + tl.arange(0, PAIRS)
        is_row = row < stop
        x_base = x_ptr + row.to(tl.int64) * I
        acc = tl.zeros((PAIRS, COLUMNS), tl.float32)
        for begin in range(0, I, INNER):
            at = begin + inner
            x = tl.load(x_base[:, None] + at[None, :], mask=is_row[:, None] & (at < I)[None, :], other=0.0)
            weight = tl.load(base[None, :] + at[:, None], mask=is_column[None, :] & (at < I)[:, None], other=0.0)
            acc = tl.dot(x, weight, acc, input_precision="ieee")
        pair = tl.load(order_ptr + row, mask=is_row, other=0)
        scale = tl.load(scale_ptr + pair, mask=is_row, other=0.0)
        target = out_ptr + pair.to(tl.int64) * H
        acc *= scale[:, None]
        tl.store(target[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _sum_pairs(
    pairs_ptr, places_ptr, scale_ptr, shared_ptr, out_ptr, H,
    K: tl.constexpr, SORTED: tl.constexpr, HAS_SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        if SORTED:
            row = tl.load(places_ptr + pair).to(tl.int64)
            total += tl.load(scale_ptr + pair) * tl.load(pairs_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
        else:
            total += tl.load(pairs_ptr + pair * H + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared_ptr + token * H + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def _sum(pairs_PH: torch.Tensor, weights_TK: torch.Tensor, shared_TH: torch.Tensor | None, places_P: torch.Tensor | None) -> torch.Tensor:
    """[T, H]: rows in the order of pairs, already weighted, or at `places_P`, to be weighted."""
    num_tokens, num_chosen = weights_TK.shape
    hidden = pairs_PH.shape[1]
    out_TH = pairs_PH.new_empty((num_tokens, hidden))
    _sum_pairs[(num_tokens, triton.cdiv(hidden, 1024))](
        pairs_PH, weights_TK if places_P is None else places_P, weights_TK, out_TH if shared_TH is None else shared_TH, out_TH, hidden,
        K=num_chosen, SORTED=places_P is not None, HAS_SHARED=shared_TH is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out_TH


def run_experts(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_EIH: torch.Tensor,
    down_EHI: torch.Tensor,
    shared: Shared,
) -> torch.Tensor:
    """Weighted sum over each token's experts, plus what `shared` returns, [T, H]. Weights: [E, gate | up, H] and [E, H, I]."""
    num_experts, _, size = down_EHI.shape
    is_many = experts_TK.numel() > _MANY_PAIRS * num_experts and x_TH.dtype is torch.bfloat16 and size % 8 == 0
    return (run_grouped if is_many else run_streamed)(x_TH, experts_TK, weights_TK, gate_up_EIH, down_EHI, shared)


def run_grouped(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_EIH: torch.Tensor,
    down_EHI: torch.Tensor,
    shared: Shared = None,
) -> torch.Tensor:
    """`run_experts` by torch's grouped products over tokens copied into the order of their experts."""
    order_P, starts = group_pairs(experts_TK, len(down_EHI))
    sorted_PH = x_TH[order_P // experts_TK.shape[1]]
    inner_PI = silu_mul(torch._grouped_mm(sorted_PH, gate_up_EIH.transpose(1, 2), offs=starts[1:]))
    pairs_PH = torch._grouped_mm(inner_PI, down_EHI.transpose(1, 2), offs=starts[1:])
    places_P = torch.empty_like(order_P)
    places_P[order_P] = torch.arange(len(order_P), dtype=torch.int32, device=order_P.device)
    return _sum(pairs_PH, weights_TK, shared and shared(), places_P)


def run_streamed(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_EIH: torch.Tensor,
    down_EHI: torch.Tensor,
    shared: Shared = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """`run_experts` by kernels that read each expert's weights once. `tiles`: of the two products, instead of the usual ones."""
    (num_experts, hidden, size), num_pairs = down_EHI.shape, experts_TK.numel()
    order_P, starts = group_pairs(experts_TK, num_experts)
    gate_up, down = tiles or usual_tiles(num_pairs / num_experts, x_TH.dtype)
    inner_PI = x_TH.new_empty((num_pairs, size))
    _gate_up[gate_up.grid(num_experts, size)](
        x_TH, gate_up_EIH, order_P, starts, inner_PI, hidden, size, experts_TK.shape[1], **gate_up.options()
    )
    pairs_PH = x_TH.new_empty((num_pairs, hidden))
    _down[down.grid(num_experts, hidden)](inner_PI, down_EHI, order_P, starts, weights_TK, pairs_PH, hidden, size, **down.options())
    return _sum(pairs_PH, weights_TK, shared and shared(), None)


def usual_tiles(pairs_per_expert: float, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """Of `_gate_up` and of `_down`. Few pairs per expert: thin tiles that stream weights. Many: ones that keep tensor cores busy."""
    if dtype is torch.float32:
        return Tile(16, 64, 32, 4, 3), Tile(16, 64, 32, 4, 4)
    if pairs_per_expert <= 8:
        return Tile(16, 32, 128, 4, 4), Tile(16, 128, 128, 4, 4)
    if pairs_per_expert <= 48:
        return Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3)
    return Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4)
