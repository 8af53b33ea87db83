"""Token embedding and output head, split over the vocabulary. A vocabulary that the ranks do not divide is padded at its end.

T tokens, H hidden, V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from workers.layers.packed import Matrix
from workers.layers.parameter import Part, Placement


class VocabEmbedding(Matrix):
    """Rows of [V, H] by rank, for looking up tokens, scoring them, or both (tied). Each rank looks up the tokens it has and an all-reduce
    adds the others' zeros."""

    def __init__(self, placement: Placement, vocab_size: int, hidden_size: int, *, only_scores: bool = False) -> None:
        super().__init__()
        self._comm = placement.comm
        self.vocab_size = vocab_size
        self._rows = -(-vocab_size // placement.comm.world_size)
        self._start = placement.comm.rank * self._rows
        start = min(self._start, vocab_size)
        stop = min(self._start + self._rows, vocab_size)
        columns = slice(0, hidden_size)
        part = Part((vocab_size, hidden_size), (slice(start, stop), columns), (slice(0, stop - start), columns))
        self._only_scores = only_scores
        shape = (self._rows, hidden_size)
        self.weight = placement.matrix(shape, [part], to_pack=True) if only_scores else placement.weight(shape, [part])
        self.weight.data[stop - start :].zero_()

    def pack(self) -> None:
        if self._only_scores:  # rows of a packed matrix cannot be looked up
            super().pack()

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        if self._comm.world_size == 1:
            return F.embedding(ids_T, self.weight)
        local_T = ids_T - self._start
        mine_T = (local_T >= 0) & (local_T < self._rows)
        rows_TH = F.embedding(local_T.clamp(0, self._rows - 1), self.weight)
        return self._comm.all_reduce(rows_TH * mine_T[:, None].to(rows_TH.dtype))

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Scores of the whole vocabulary [T, V] in float32 on every rank: each computes its rows', an all-gather joins them."""
        if self._comm.world_size == 1:
            return self.multiply(hidden_TH, dtype=torch.float32)
        return self._comm.all_gather(self.multiply(hidden_TH))[:, : self.vocab_size].float()
