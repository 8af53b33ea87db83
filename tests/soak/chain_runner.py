"""A rank whose tokens follow from every byte of every page before them: one wrong byte, wherever it was copied, is a wrong token."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from cache_store.keys import Layout
from workers.config import WorkerConfig
from workers.echo import HostPages
from workers.kv.layout import PageLayout
from workers.step import RowResult, StepPlan

BLOCK_SIZE = 16
NUM_PAGES = 320
MAX_MODEL_LEN = 1024
MAX_NUM_BATCHED_TOKENS = 256
VOCAB_SIZE = 1 << 15
PART_SHAPE = (2, 2, BLOCK_SIZE, 32)  # 8 KiB: 512 bytes a position
WORDS = 64  # of 8 bytes, a position


def position_value(previous: int, token: int) -> int:
    """What is stored for a token: it names the whole prefix."""
    return xxhash.xxh3_64_intdigest(struct.pack("<QI", previous, token))


def token_after(stored: bytes) -> int:
    """The token that follows a prefix, from all the bytes that are stored for it."""
    return xxhash.xxh3_64_intdigest(stored) % VOCAB_SIZE


def expected_tokens(prompt: Sequence[int], num_new: int) -> list[int]:
    """What a replica must answer, whatever it has reused."""
    value, stored, tokens = 0, bytearray(), []
    for token in prompt:
        value = position_value(value, token)
        stored += struct.pack("<Q", value) * WORDS
    for _ in range(num_new):
        tokens.append(token_after(bytes(stored)))
        value = position_value(value, tokens[-1])
        stored += struct.pack("<Q", value) * WORDS
    return tokens


@dataclass
class Row:
    tokens: list[int]
    pages: list[int]
    num_computed: int


class ChainRunner:
    """A runner for `workers.worker.RankParts`. One GQA head, no torch."""

    def __init__(self, config: WorkerConfig, comm: Any, progress: Any) -> None:
        store = Layout("gqa", 0, BLOCK_SIZE, "float32", 1, PART_SHAPE)
        self.layout = PageLayout(store, 1, 0, (1, *PART_SHAPE), "float32", 0, 1, 0, 1)
        self.pool = HostPages(self.layout, NUM_PAGES)
        self.info_fields = {
            "num_pages": NUM_PAGES,
            "block_size": BLOCK_SIZE,
            "max_model_len": MAX_MODEL_LEN,
            "vocab_size": VOCAB_SIZE,
            "layout": store,
            "model_config": b"chain",
            "weights_digest": b"chain",
            "compute_dtype": "float32",
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS,
            "max_prompt_tokens_beside_outputs": MAX_NUM_BATCHED_TOKENS,
        }
        self._rows: dict[int, Row] = {}
        self._words = self.pool.tensor.view(np.uint64).reshape(NUM_PAGES, BLOCK_SIZE, WORDS)
        progress("chain", 1, 1)

    is_asynchronous = False
    gates = None

    def launch(self, plan: StepPlan, before_forward: Callable[[bool], None]) -> StepPlan:
        before_forward(False)
        return plan

    def collect(self, plan: StepPlan) -> list[RowResult]:
        for row_id in plan.rows_out:
            self._rows.pop(row_id, None)
        for new in plan.rows_in:
            tokens = np.frombuffer(new.token_ids, np.uint32).tolist()
            self._rows[new.row_id] = Row(tokens, list(new.pages), new.num_computed_tokens)
        return [RowResult(each.row_id, self._step(self._rows[each.row_id], each.num_query_tokens, each.new_pages)) for each in plan.rows]

    def close(self) -> None:
        pass

    def _step(self, row: Row, num_query_tokens: int, new_pages: list[int]) -> list[int]:
        row.pages += new_pages
        for position in range(row.num_computed, row.num_computed + num_query_tokens):
            previous = int(self._at(row, position - 1)[0]) if position else 0
            self._at(row, position)[:] = position_value(previous, row.tokens[position])
        row.num_computed += num_query_tokens
        if row.num_computed < len(row.tokens):
            return []
        stored = self._words[row.pages].reshape(-1, WORDS)[: row.num_computed].tobytes()
        row.tokens.append(token_after(stored))
        return row.tokens[-1:]

    def _at(self, row: Row, position: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        words: np.ndarray[Any, np.dtype[np.uint64]] = self._words[row.pages[position // BLOCK_SIZE], position % BLOCK_SIZE]
        return words
