"""From logits to tokens: penalties, temperature, min-p, top-k and top-p, then Gumbel noise and the largest.

The noise is a pure function of (seed, output position, token id), so a row's draws depend on nothing else in the batch, on no device and
on no tensor-parallel size, and go on unchanged when a request is resumed elsewhere.

S rows that sample, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from workers.noise import gumbel, mix_

_PIECE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # of logits drawn from at once: bounds temporary memory, fits the CPU's cache
_KEY_SALTS = (0x1E3779B9, 0x3C6EF372)


class Draws(NamedTuple):
    """How each of S rows draws. Tensors are on the logits' device, flags on the host: a filter that no row uses is skipped."""

    temperature: torch.Tensor  # [S] float32; 0: greedy
    min_p: torch.Tensor  # [S] float32
    top_p: torch.Tensor  # [S] float32
    top_k: torch.Tensor  # [S] int64; 0: all
    seeds: torch.Tensor  # [S, 2] int32 words
    positions: torch.Tensor  # [S] int32; number of output tokens before this one
    max_top_k: int  # over the rows; 0: none has one
    any_top_p: bool
    any_min_p: bool


class Penalties(NamedTuple):
    """Penalties of S rows, as vLLM defines them: repetition over prompt and output, presence and frequency over the output."""

    repetition: torch.Tensor  # [S] float32
    presence: torch.Tensor  # [S] float32
    frequency: torch.Tensor  # [S] float32
    in_prompt: torch.Tensor  # [S, V] bool
    output_counts: torch.Tensor  # [S, V] int32


def penalise(logits_SV: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    """Logits after penalties, float32 [S, V]."""
    repetition_S1 = penalties.repetition[:, None]
    repeated_SV = torch.where(logits_SV > 0, logits_SV / repetition_S1, logits_SV * repetition_S1)
    out_SV = torch.where(penalties.in_prompt | (penalties.output_counts > 0), repeated_SV, logits_SV)
    out_SV -= penalties.frequency[:, None] * penalties.output_counts
    return out_SV.sub_(penalties.presence[:, None] * (penalties.output_counts > 0))


def draw(logits_SV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Tokens [S] (int64). `logits_SV` is float32 and already penalised."""
    rows = max(1, _PIECE_ELEMENTS[logits_SV.device.type] // logits_SV.shape[1])
    pieces = []
    for start in range(0, len(logits_SV), rows):
        piece = slice(start, start + rows)
        settings = [value[piece] if isinstance(value, torch.Tensor) else value for value in draws]
        pieces.append(_draw_piece(logits_SV[piece], Draws(*settings)))
    return torch.cat(pieces)


def _draw_piece(logits_SV: torch.Tensor, draws: Draws) -> torch.Tensor:
    if logits_SV.is_cuda:
        return _draw_fused(logits_SV, draws)
    kept_SV = keep(logits_SV, draws)
    noise_SV = gumbel(_bits(draws.seeds, draws.positions, kept_SV.shape[1]))
    return torch.where((draws.temperature == 0)[:, None], kept_SV, noise_SV.add_(kept_SV)).argmax(-1)


def _draw_fused(logits_SV: torch.Tensor, draws: Draws) -> torch.Tensor:
    from workers.kernels import sampling

    keys_S2 = noise_keys(draws.seeds, draws.positions)
    if draws.any_min_p or draws.max_top_k or draws.any_top_p:
        return sampling.draw(keep(logits_SV, draws), (draws.temperature > 0).float(), keys_S2)
    return sampling.draw(logits_SV, draws.temperature, keys_S2)


def keep(logits_SV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Logits after temperature, with -inf for the tokens that are not drawn from; [S, V]. Greedy rows keep a temperature of 1.

    In vLLM's order: min-p, top-k, top-p. Where min-p and top-p are both set, transformers takes top-p first, which can keep more.
    """
    scaled_SV = logits_SV / torch.where(draws.temperature == 0, 1.0, draws.temperature)[:, None]
    if draws.any_min_p:
        floor_S1 = scaled_SV.amax(-1, keepdim=True) + draws.min_p.log()[:, None]
        scaled_SV = scaled_SV.masked_fill(scaled_SV < floor_S1, float("-inf"))
    if draws.max_top_k:
        scaled_SV = _keep_top_k(scaled_SV, draws)
    if draws.any_top_p:
        scaled_SV = _keep_top_p(scaled_SV, draws.top_p)
    return scaled_SV


def _keep_top_k(scaled_SV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Masks what is smaller than the k-th largest; ties with it stay, as in transformers and vLLM."""
    best = scaled_SV.topk(min(draws.max_top_k, scaled_SV.shape[1]), dim=-1).values
    kth_S1 = best.gather(1, (draws.top_k[:, None] - 1).clamp(0, best.shape[1] - 1))
    return scaled_SV.masked_fill((scaled_SV < kth_S1) & (draws.top_k > 0)[:, None], float("-inf"))


def _keep_top_p(scaled_SV: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keeps the most likely tokens until their probability reaches top_p, at least one."""
    sorted_SV, order_SV = scaled_SV.sort(dim=-1, descending=True, stable=True)
    probabilities_SV = sorted_SV.softmax(-1)
    before_SV = probabilities_SV.cumsum(-1) - probabilities_SV
    dropped_SV = (before_SV >= top_p[:, None]) & (top_p < 1)[:, None]
    dropped_SV[:, 0] = False
    return scaled_SV.masked_fill(torch.empty_like(dropped_SV).scatter_(1, order_SV, dropped_SV), float("-inf"))


def noise_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Two keys of 32 bits per row, int32 [S, 2], each a hash of the row's seed and output position."""
    keys = []
    for salt, words in zip(_KEY_SALTS, (seeds, seeds.flip(1)), strict=True):
        key_S = mix_(words[:, 0] ^ salt)
        key_S = mix_(key_S ^ words[:, 1])
        keys.append(mix_(key_S ^ positions))
    return torch.stack(keys, dim=1)


def _bits(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """32 random bits per row and token, int32 [S, V]: tokens hashed under the row's keys."""
    keys_S2 = noise_keys(seeds, positions)
    tokens_V = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    return mix_(mix_(tokens_V ^ keys_S2[:, :1]).bitwise_xor_(keys_S2[:, 1:]))


def best_logprobs(logits_SV: torch.Tensor, chosen_S: torch.Tensor, num_best: int) -> Callable[[], list[list[tuple[int, float]]]]:
    """Per row the chosen token's (id, logprob), then those of the `num_best` most likely, from the raw logits. Computed now; what is
    returned reads them, once the device is done."""
    logprobs_SV = logits_SV.float().log_softmax(-1)
    best = logprobs_SV.topk(min(num_best, logprobs_SV.shape[1]), dim=-1)
    ids = _to_host(torch.cat((chosen_S[:, None], best.indices), dim=1))
    values = _to_host(torch.cat((logprobs_SV.gather(1, chosen_S[:, None]), best.values), dim=1))

    def read() -> list[list[tuple[int, float]]]:
        rows = zip(ids.tolist(), values.tolist(), strict=True)
        return [list(zip(row_ids, row_values, strict=True)) for row_ids, row_values in rows]

    return read


def all_logprobs(logits_SV: torch.Tensor) -> Callable[[], bytes]:
    """The whole log-softmax as little-endian float32 [S, V]. Computed now, read later."""
    logprobs_SV = _to_host(logits_SV.float().log_softmax(-1))
    return lambda: logprobs_SV.numpy().astype("<f4").tobytes()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is complete once the device has come so far."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
