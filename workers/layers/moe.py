"""Routed and shared experts of DeepSeek-V2 (arXiv 2405.04434, section 2.2) and V3 (arXiv 2412.19437, section 2.1.2), as transformers
computes them.

T tokens, H hidden, E experts, G groups of experts, K experts per token, I intermediate size on this rank
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.layers.linear import GatedMlp
from workers.layers.packed import Packed
from workers.layers.parameter import Part, Placement
from workers.models.config import MoeConfig

_MAX_SIDE_TOKENS = 256  # a longer step keeps the GPU busy without a second stream
Shared = Callable[[], torch.Tensor]


class Router(Packed):
    """Chooses experts by their scores, inside the best groups; weights come from the scores alone. Float32.

    sigmoid (V3): a correction bias joins the choice; a group counts as its best two.   softmax (V2): a group counts as its best.
    """

    def __init__(self, moe: MoeConfig, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self._moe = moe
        self.weight = placement.whole((moe.num_experts, hidden_size), torch.float32)
        self._terms: torch.Tensor | None = None  # [n * E, H] bfloat16, that add up to the weight; on CUDA, for bfloat16 inputs
        self.e_score_correction_bias = placement.whole((moe.num_experts,), torch.float32) if moe.scoring == "sigmoid" else None

    def pack(self) -> None:
        if self.weight.is_cuda:
            from workers.kernels.experts import bfloat16_terms

            self._terms = bfloat16_terms(self.weight.data)

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts [T, K] (integers) and their weights [T, K]."""
        moe = self._moe
        if x_TH.is_cuda:
            from workers.kernels.experts import choose_experts, score_experts

            return choose_experts(
                score_experts(x_TH, self.weight, self._terms),
                self.e_score_correction_bias,
                moe.num_experts_per_token,
                num_groups=moe.num_groups,
                num_kept_groups=moe.num_groups_per_token,
                sigmoid=moe.scoring == "sigmoid",
                normalise=moe.normalise_weights,
                scale=moe.scaling_factor,
            )
        logits_TE = F.linear(x_TH.float(), self.weight)
        scores_TE = logits_TE.sigmoid() if moe.scoring == "sigmoid" else logits_TE.softmax(-1)
        choice_TE = scores_TE if self.e_score_correction_bias is None else scores_TE + self.e_score_correction_bias
        if moe.num_groups > 1:
            choice_TGE = choice_TE.unflatten(1, (moe.num_groups, -1))
            groups_TG = choice_TGE.topk(2, dim=-1).values.sum(-1) if moe.scoring == "sigmoid" else choice_TGE.amax(-1)
            kept = groups_TG.topk(moe.num_groups_per_token, dim=-1).indices
            dropped_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, kept, False)
            choice_TE = choice_TGE.masked_fill(dropped_TG[..., None], float("-inf")).flatten(1)
        experts_TK = choice_TE.topk(moe.num_experts_per_token, dim=-1).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if moe.normalise_weights:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return experts_TK, weights_TK * moe.scaling_factor


class Experts(nn.Module):
    """All routed experts, each split over its intermediate size; returns this rank's partial sum."""

    def __init__(self, moe: MoeConfig, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        share = placement.share(moe.intermediate_size)
        total, size, mine = share.total, share.size, slice(share.start, share.stop)
        rows, hidden = slice(0, size), slice(0, hidden_size)
        gate_up_parts, down_parts = [], []
        for expert in range(moe.num_experts):
            gate_up_parts.append(Part((total, hidden_size), (mine, hidden), (expert, rows, hidden)))
            gate_up_parts.append(Part((total, hidden_size), (mine, hidden), (expert, slice(size, 2 * size), hidden)))
            down_parts.append(Part((hidden_size, total), (hidden, mine), (expert, hidden, rows)))
        self.gate_up_proj = placement.matrix((moe.num_experts, 2 * size, hidden_size), gate_up_parts)
        self.down_proj = placement.matrix((moe.num_experts, hidden_size, size), down_parts)

    def forward(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, shared: Shared | None) -> torch.Tensor:
        """Weighted sum over the chosen experts, plus what `shared` returns, [T, H], which is asked last."""
        if x_TH.is_cuda:
            from workers.kernels.experts import run_experts

            return run_experts(x_TH, experts_TK, weights_TK, self.gate_up_proj, self.down_proj, shared)
        num_tokens, num_chosen = experts_TK.shape
        flat = experts_TK.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.gate_up_proj)).tolist()
        sorted_in = x_TH[order // num_chosen]
        sorted_out = torch.empty_like(sorted_in)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            rows = slice(start, start + count)
            gate, up = F.linear(sorted_in[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            sorted_out[rows] = F.linear(F.silu(gate).mul_(up), self.down_proj[expert])
            start += count
        # Undo the sort and add up per token: unlike adding by index, this sums in one order every time.
        out_TKH = torch.empty_like(sorted_out).index_copy_(0, order, sorted_out).view(num_tokens, num_chosen, -1)
        out_TH = (out_TKH * weights_TK[..., None].to(out_TKH.dtype)).sum(1)
        return out_TH if shared is None else out_TH + shared()


class MoeMlp(nn.Module):
    """Routed experts plus one shared MLP that every token takes; one all-reduce for both.

    Choosing experts is a row of short kernels that leave a GPU idle: where tokens are few, the shared MLP runs beside it on another stream.
    """

    def __init__(self, moe: MoeConfig, hidden_size: int, placement: Placement, *, bias: bool = False) -> None:
        """`bias`: of the shared MLP; experts have none."""
        super().__init__()
        self._comm = placement.comm
        self.gate = Router(moe, hidden_size, placement)
        self.experts = Experts(moe, hidden_size, placement)
        shared_size = moe.num_shared_experts * moe.intermediate_size
        self.shared_experts = GatedMlp(placement, hidden_size, shared_size, bias=bias, reduce=False) if shared_size else None
        self._side_stream = placement.side_stream

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        shared = self._begin_shared(x_TH)
        experts_TK, weights_TK = self.gate(x_TH)
        return self._comm.all_reduce(self.experts(x_TH, experts_TK, weights_TK, shared))

    def _begin_shared(self, x_TH: torch.Tensor) -> Shared | None:
        """What returns the shared MLP's part, for work of the current stream."""
        mlp, side = self.shared_experts, self._side_stream
        if mlp is None:
            return None
        if side is None or len(x_TH) > _MAX_SIDE_TOKENS:
            return partial(mlp, x_TH)
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            shared_TH = mlp(x_TH)

        def join() -> torch.Tensor:
            main.wait_stream(side)
            return shared_TH

        return join
