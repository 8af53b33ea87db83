"""Steps as attention backends get them: rows of some cached and some new tokens, on scattered pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cache_store.keys import Layout
from workers.attention.base import AttentionBatch
from workers.kv.layout import PageLayout
from workers.kv.pool import PagePool

Row = tuple[int, int]  # tokens in pages already, and queries


def make_batch(
    rows: Sequence[Row], block_size: int, pages: Sequence[int], rng: np.random.RandomState, device: torch.device | None = None
) -> AttentionBatch:
    """Rows of one query, which come first, stand at the end of their sequence by assumption. Pages are of `pages`, in no order."""
    free = rng.permutation(np.asarray(pages)).tolist()
    lengths = [cached + queries for cached, queries in rows]
    counts = [-(-length // block_size) for length in lengths]
    table = np.zeros((len(rows), max(counts)), np.int64)
    starts, positions, owners = [0], [], []
    for index, ((cached, queries), count) in enumerate(zip(rows, counts, strict=True)):
        table[index, :count] = [free.pop() for _ in range(count)]
        positions += range(cached, cached + queries)
        owners += [index] * queries
        starts.append(starts[-1] + queries)
    position = np.array(positions)
    flat = np.concatenate([table[index, :count] for index, count in enumerate(counts)])
    return AttentionBatch(
        num_decode_rows=sum(queries == 1 for _, queries in rows),
        query_starts=starts,
        seq_lens=lengths,
        device_seq_lens=torch.tensor(lengths, device=device),
        block_table=torch.from_numpy(table).to(device),
        pages=torch.from_numpy(table[owners, position // block_size]).to(device),
        offsets=torch.from_numpy(position % block_size).to(device),
        kv_pages=torch.from_numpy(flat.astype(np.int32)).to(device),
        kv_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
    )


def make_pools(page_shape: tuple[int, ...], block_size: int, num_pages: int, dtype: str, device: torch.device) -> list[PagePool]:
    """Two of the same random content."""
    layout = PageLayout(Layout("any", 0, block_size, dtype, 1, page_shape), 1, 0, page_shape, dtype, 0, 1, 0, 1)
    pools = [PagePool(layout, num_pages, device) for _ in range(2)]
    pools[0].tensor.normal_()
    pools[1].tensor.copy_(pools[0].tensor)
    return pools
