"""The rows a rank is working on. Plans bring deltas; everything that lasts longer than a step is kept here by slot.

Lengths are known on the host without asking the device: a step that samples adds one token, whichever it is. Sampled tokens themselves
stay on the device: `last_tokens` feeds the next step. Nothing here waits for the device: what it needs is copied from pinned memory.

A step of decode rows alone, or of one short rest of a prompt, may run as a captured graph. Then it is padded to a captured size with rows
or tokens that write to the null page, and its numbers go to the addresses that the graph reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from workers.attention.base import AttentionBatch
from workers.noise import split_seed
from workers.sampler import Draws, Penalties
from workers.step import NULL_PAGE, NewRow, SamplingSettings, StepPlan


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device (on the CPU: the same memory) that does not wait for what the device is doing."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


_READ_AHEAD_PAGES = 256  # kernels may look up pages of a whole tile of keys, behind the end of the last row


class GraphInputs:
    """Where a captured graph reads its step: int64 words, a column per number of a token or of a row, then the rows' pages as int32.

    A graph is of decode rows, with a token each that it looks up by the row's slot, or of `num_tokens` of one prompt. `max_pages`: of all
    rows together.
    """

    def __init__(self, num_rows: int, num_tokens: int, max_pages: int, null_slot: int, device: torch.device) -> None:
        self.num_rows, self.num_tokens, self.max_pages = num_rows, num_tokens, max_pages
        counts = [num_tokens] * 4 + [num_rows] * 3
        self._starts = [0, *np.cumsum(counts).tolist()]
        self._padding = np.zeros(self._starts[-1], np.int64)  # what a step leaves unsaid
        self._padding[self._starts[4] : self._starts[5]] = null_slot
        self._padding[self._starts[5] : self._starts[6]] = 1
        self._words = torch.zeros(len(self._padding) + -(-max_pages // 2), dtype=torch.int64, device=device)
        *columns, pages = self._words.split([*counts, len(self._words) - len(self._padding)])
        self.ids, self.positions, self.pages, self.offsets, self.slots, self.seq_lens, self.last = columns
        self.kv_pages = pages.view(torch.int32)
        self._words[: len(self._padding)] = torch.from_numpy(self._padding)

    @property
    def is_prompt(self) -> bool:
        return self.num_tokens != self.num_rows

    def fill(self, columns: Sequence[np.ndarray], kv_pages: np.ndarray) -> np.ndarray:
        """`columns` in the order of the attributes, each as long as it likes. Returns the rows' lengths, padded."""
        num_columns = len(self._padding)
        words = np.zeros(num_columns + -(-len(kv_pages) // 2), np.int64)
        words[:num_columns] = self._padding
        for start, column in zip(self._starts, columns, strict=False):
            words[start : start + len(column)] = column
        words[num_columns:].view(np.int32)[: len(kv_pages)] = kv_pages
        source = torch.from_numpy(words)
        self._words[: len(words)].copy_(source.pin_memory() if self._words.is_cuda else source, non_blocking=True)
        return words[self._starts[5] : self._starts[6]]


def _as_words(values: np.ndarray) -> np.ndarray:
    """int32 values as int64 words, two in each."""
    return np.concatenate((values, np.zeros(len(values) % 2, np.int32))).view(np.int64)


class PromptScores(NamedTuple):
    """Prompt positions of one row whose logprobs this step makes."""

    plan_row: int
    num_best: int
    tokens: range  # of the step: their logits score the targets
    targets: np.ndarray  # int64 token ids


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step, ready to run."""

    attention: AttentionBatch
    ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    started_pages: torch.Tensor  # int64: begun but not filled by this step
    sampled_plan_rows: np.ndarray  # [S] rows that sample, as rows of the plan
    sampled_slots: np.ndarray  # [S]
    sampled_tokens: torch.Tensor  # [S] int64: the tokens of the step whose logits they sample from
    output_positions: np.ndarray  # [S] output tokens before the new one
    sampled_device_slots: torch.Tensor  # [S] int64
    prompt_scores: list[PromptScores]
    graph: GraphInputs | None = None  # the captured graph to run; ids, positions and the attention's tensors are its own then


class Batch:
    """Slots for up to `max_num_seqs` rows. Plans must be consistent: an unknown row or an overfull batch is the engine's bug."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device, *, has_block_table: bool = True
    ) -> None:
        """`has_block_table`: whether steps come with one."""
        self.max_model_len, self.block_size = max_model_len, block_size
        self.max_blocks = -(-max_model_len // block_size)
        self.null_slot = max_num_seqs  # of padding
        self.decode_graphs: list[GraphInputs] = []  # captured sizes, ascending
        self.prompt_graphs: list[GraphInputs] = []  # by tokens, then pages
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._slots: dict[int, int] = {}
        self._free = list(range(max_num_seqs))[::-1]
        self._known_tokens: list[np.ndarray] = [np.empty(0, np.uint32)] * max_num_seqs  # as of admission
        self._num_known = np.zeros(max_num_seqs, np.int64)
        self._num_computed = np.zeros(max_num_seqs, np.int64)
        self._num_prompt = np.zeros(max_num_seqs, np.int64)
        self._num_pages = np.zeros(max_num_seqs, np.int64)
        self._has_sampled = np.zeros(max_num_seqs, bool)  # else the last token is known here alone
        self._block_table = np.zeros((max_num_seqs, self.max_blocks), np.int64)
        self._has_device_table = has_block_table
        self._device_table = torch.from_numpy(self._block_table if has_block_table else self._block_table[:0]).to(device)  # CPU: shared
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.sampling = SamplingSlots(max_num_seqs, vocab_size, device)

    def apply(self, plan: StepPlan) -> StepInput | None:
        """Takes the plan's deltas and lays out its step; None when no row runs."""
        for row_id in plan.rows_out:
            slot = self._slots.pop(row_id)
            self._free.append(slot)
            self._known_tokens[slot] = np.empty(0, np.uint32)
            self.sampling.release(slot)
        if plan.rows_in:
            self._admit(plan.rows_in)
        if not plan.rows:
            return None
        slots = np.fromiter((self._slots[row.row_id] for row in plan.rows), np.int64, len(plan.rows))
        self._append_pages([(slot, row.new_pages) for slot, row in zip(slots.tolist(), plan.rows, strict=True) if row.new_pages])
        num_queries = np.fromiter((row.num_query_tokens for row in plan.rows), np.int64, len(plan.rows))
        return self._lay_out(slots, num_queries)

    def _admit(self, rows: list[NewRow]) -> None:
        slots = []
        for row in rows:
            assert row.row_id not in self._slots, f"row {row.row_id} is in the batch already"
            slot = self._slots[row.row_id] = self._free.pop()
            tokens = self._known_tokens[slot] = np.frombuffer(row.token_ids, "<u4")
            self._num_known[slot] = len(tokens)
            self._num_computed[slot] = row.num_computed_tokens
            self._num_prompt[slot] = row.num_prompt_tokens
            self._num_pages[slot] = 0
            slots.append(slot)
        index = np.array(slots, np.int64)
        self._has_sampled[index] = False
        self._block_table[index] = NULL_PAGE
        if self._has_device_table and self._on_cuda:
            self._device_table[to_device(index, self._device)] = NULL_PAGE
        self._append_pages([(slot, row.pages) for slot, row in zip(slots, rows, strict=True) if row.pages])
        self.sampling.admit(slots, rows, self._known_tokens)

    def _append_pages(self, added: list[tuple[int, list[int]]]) -> None:
        copied = self._has_device_table and self._on_cuda
        places: list[np.ndarray] = []
        for slot, new_pages in added:
            first = int(self._num_pages[slot])
            stop = self._num_pages[slot] = first + len(new_pages)
            self._block_table[slot, first:stop] = new_pages
            if copied:
                places.append(np.arange(first, stop) + slot * self.max_blocks)
        if places:
            flat = np.concatenate(places)
            self._device_table.view(-1)[to_device(flat, self._device)] = to_device(self._block_table.ravel()[flat], self._device)

    def _lay_out(self, slots: np.ndarray, num_queries: np.ndarray) -> StepInput:
        is_decode = (num_queries == 1) & (self._num_computed[slots] == self._num_known[slots] - 1)
        self._send_last_tokens(slots[is_decode & ~self._has_sampled[slots]])
        # Decode rows first, those of like length together; then the others by number of query tokens.
        order = np.lexsort((self._num_computed[slots], num_queries, ~is_decode))
        slots, num_queries, num_decode = slots[order], num_queries[order], int(is_decode.sum())
        before = self._num_computed[slots]
        after = before + num_queries
        assert (after <= self._num_known[slots]).all(), "a row would compute tokens that it does not have"
        assert (after <= self._num_pages[slots] * self.block_size).all(), "a row would write beyond its pages"
        starts = np.concatenate(([0], np.cumsum(num_queries)))
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - before, num_queries)
        blocks, offsets = np.divmod(positions, self.block_size)
        pages = self._block_table[np.repeat(slots, num_queries), blocks]
        sampled = np.flatnonzero(after == self._num_known[slots])
        scores = self._prompt_scores(slots, order, before, after, starts)
        graph = None if scores else self._graph_for(len(slots), num_decode, len(positions), int(after.sum()), len(sampled))
        lay_out = self._lay_out_graph if graph is not None else self._lay_out_eager
        step = StepInput(
            **lay_out(graph, slots, num_decode, before, after, starts, positions, pages, offsets, sampled),
            sampled_plan_rows=order[sampled],
            sampled_slots=slots[sampled],
            output_positions=self._num_known[slots[sampled]] - self._num_prompt[slots[sampled]],
            prompt_scores=scores,
            graph=graph,
        )
        self._num_computed[slots] = after
        self._num_known[slots[sampled]] += 1
        self._has_sampled[slots[sampled]] = True
        return step

    def _send_last_tokens(self, slots: np.ndarray) -> None:
        if len(slots):
            last = np.array([self._known_tokens[slot][-1] for slot in slots], np.int64)
            self.last_tokens[to_device(slots, self._device)] = to_device(last, self._device)

    def _graph_for(self, num_rows: int, num_decode: int, num_tokens: int, num_keys: int, num_sampled: int) -> GraphInputs | None:
        """The smallest captured one that holds the step. Those of decode rows have pages for any number of keys."""
        if num_decode == num_rows:
            graphs = self.decode_graphs
        elif num_rows == num_sampled == 1:
            graphs = self.prompt_graphs
        else:
            return None
        return next((each for each in graphs if each.num_tokens >= num_tokens and each.max_pages * self.block_size >= num_keys), None)

    def _lay_out_eager(
        self, _graph: None, slots: np.ndarray, num_decode: int, before: np.ndarray, after: np.ndarray, starts: np.ndarray,
        positions: np.ndarray, pages: np.ndarray, offsets: np.ndarray, sampled: np.ndarray,
    ) -> dict[str, Any]:  # fmt: skip
        host_ids = self._host_ids(slots[num_decode:], before[num_decode:], after[num_decode:])
        last_block = (after - 1) // self.block_size
        is_started = (last_block > (before - 1) // self.block_size) & (after % self.block_size != 0)
        started = self._block_table[slots[is_started], last_block[is_started]]
        kv_starts, kv_pages = self._kv_pages(slots, last_block) if self._on_cuda else (None, np.empty(0, np.int32))
        device = self._send(
            slots, host_ids, positions, pages, offsets, after, starts[sampled + 1] - 1, started,
            slots[sampled], _as_words(np.concatenate((kv_pages, np.full(_READ_AHEAD_PAGES, NULL_PAGE, np.int32)))),
        )  # fmt: skip
        device_slots, device_ids, device_positions, device_pages, device_offsets, device_after, sampled_tokens, started_pages = device[:8]
        attention = AttentionBatch(
            num_decode_rows=num_decode,
            query_starts=starts.tolist(),
            seq_lens=after.tolist(),
            device_seq_lens=device_after,
            block_table=self._device_table[device_slots, : int(last_block.max()) + 1] if self._has_device_table else self._device_table,
            pages=device_pages,
            offsets=device_offsets,
            kv_pages=device[9].view(torch.int32)[: len(kv_pages)] if self._on_cuda else None,
            kv_starts=kv_starts,
        )
        return {
            "attention": attention,
            "ids": torch.cat((self.last_tokens[device_slots[:num_decode]], device_ids)) if num_decode else device_ids,
            "positions": device_positions,
            "started_pages": started_pages,
            "sampled_tokens": sampled_tokens,
            "sampled_device_slots": device[8],
        }

    def _lay_out_graph(
        self, graph: GraphInputs, slots: np.ndarray, num_decode: int, before: np.ndarray, after: np.ndarray, starts: np.ndarray,
        positions: np.ndarray, pages: np.ndarray, offsets: np.ndarray, sampled: np.ndarray,
    ) -> dict[str, Any]:  # fmt: skip
        """Rows that all sample. Padding: one token at the start of the null page for each row."""
        num_padding = graph.num_rows - len(slots)
        ids = self._host_ids(slots, before, after) if graph.is_prompt else starts[:0]
        kv_starts, kv_pages = self._kv_pages(slots, (after - 1) // self.block_size)
        if num_padding:
            kv_starts = np.concatenate((kv_starts, kv_starts[-1] + np.arange(1, num_padding + 1, dtype=np.int32)))
            kv_pages = np.concatenate((kv_pages, np.full(num_padding, NULL_PAGE, np.int32)))
        seq_lens = graph.fill([ids, positions, pages, offsets, slots, after, starts[1:] - 1], kv_pages)
        attention = AttentionBatch(
            num_decode_rows=0 if graph.is_prompt else graph.num_rows,
            query_starts=starts.tolist() if graph.is_prompt else range(graph.num_rows + 1),
            seq_lens=seq_lens,
            device_seq_lens=graph.seq_lens,
            block_table=self._device_table,
            pages=graph.pages,
            offsets=graph.offsets,
            kv_pages=graph.kv_pages[: len(kv_pages)],
            kv_starts=kv_starts,
            captured_pages=graph.max_pages,
        )
        return {
            "attention": attention,
            "ids": graph.ids,
            "positions": graph.positions,
            "started_pages": graph.slots[:0],  # flashinfer's kernels never read behind a row's end
            "sampled_tokens": graph.slots[:0],
            "sampled_device_slots": graph.slots[: len(slots)],
        }

    def _host_ids(self, slots: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Tokens [before, after) of some slots, all known since their admission, one row after the other; uint32."""
        known = [self._known_tokens[slot][start:stop] for slot, start, stop in zip(slots, before, after, strict=True)]
        return np.concatenate([np.empty(0, np.uint32), *known])

    def _kv_pages(self, slots: np.ndarray, last_block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pages of some slots up to their last block, one row after the other, and where each row's begin; int32."""
        counts = last_block + 1
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        columns = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        return starts, self._block_table[np.repeat(slots, counts), columns].astype(np.int32)

    def _prompt_scores(
        self, slots: np.ndarray, order: np.ndarray, before: np.ndarray, after: np.ndarray, starts: np.ndarray
    ) -> list[PromptScores]:
        scores = []
        for row in np.flatnonzero(self.sampling.wants_prompt_logprobs[slots]):
            slot = int(slots[row])
            settings = self.sampling.settings[slot]
            assert settings.num_prompt_logprobs is not None
            first = max(int(before[row]), settings.prompt_logprobs_start - 1, 0)
            last = min(int(after[row]), int(self._num_prompt[slot]) - 1)
            if first < last:
                shift = int(starts[row] - before[row])
                targets = self._known_tokens[slot][first + 1 : last + 1].astype(np.int64)
                scores.append(PromptScores(int(order[row]), settings.num_prompt_logprobs, range(first + shift, last + shift), targets))
        return scores

    def _send(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """The arrays as int64 on the device, with one copy for all of them."""
        if not self._on_cuda:
            return [torch.from_numpy(array.astype(np.int64, copy=False)) for array in arrays]
        packed = torch.from_numpy(np.concatenate([array.astype(np.int64, copy=False) for array in arrays])).pin_memory()
        return list(packed.to(self._device, non_blocking=True).split([len(array) for array in arrays]))


class SamplingSlots:
    """Sampling settings by slot, and the token counts of those rows that are penalised."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self.settings = [SamplingSettings()] * num_slots
        self._floats = np.zeros((num_slots, 6), np.float32)  # temperature, min_p, top_p, repetition, presence, frequency
        self._ints = np.zeros((num_slots, 3), np.int32)  # top_k, seed words
        self.wants_prompt_logprobs = np.zeros(num_slots, bool)
        self._is_penalised = np.zeros(num_slots, bool)
        self._counts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # slot -> in prompt [V] bool, output counts [V] int32

    def admit(self, slots: list[int], rows: list[NewRow], known_tokens: list[np.ndarray]) -> None:
        for slot, row in zip(slots, rows, strict=True):
            s = self.settings[slot] = row.sampling
            self._floats[slot] = s.temperature, s.min_p, s.top_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty
            self._ints[slot] = min(s.top_k, self._vocab_size), *split_seed(s.seed)
            self.wants_prompt_logprobs[slot] = s.num_prompt_logprobs is not None
            self._is_penalised[slot] = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
            if self._is_penalised[slot]:
                prompt, output = (known_tokens[slot][part] for part in (slice(row.num_prompt_tokens), slice(row.num_prompt_tokens, None)))
                in_prompt = np.zeros(self._vocab_size, bool)
                in_prompt[prompt] = True
                counts = np.bincount(output, minlength=self._vocab_size).astype(np.int32)
                self._counts[slot] = (to_device(in_prompt, self._device), to_device(counts, self._device))

    def release(self, slot: int) -> None:
        self._counts.pop(slot, None)

    def is_plain_greedy(self, slots: np.ndarray) -> bool:
        """Whether the largest logit is the answer for all of them."""
        return not self._floats[slots, 0].any() and not self._is_penalised[slots].any()

    def draws(self, slots: np.ndarray, output_positions: np.ndarray) -> Draws:
        host, ints = self._floats[slots], self._ints[slots]
        words = np.concatenate((host.view(np.int32), ints, output_positions.astype(np.int32)[:, None]), axis=1)
        floats_SF, top_k, seeds_S2, positions = to_device(words, self._device).split([host.shape[1], 1, 2, 1], dim=1)
        temperature, min_p, top_p = floats_SF.view(torch.float32).unbind(1)[:3]
        return Draws(
            temperature=temperature,
            min_p=min_p,
            top_p=top_p,
            top_k=top_k[:, 0].long(),
            seeds=seeds_S2,
            positions=positions[:, 0],
            max_top_k=int(ints[:, 0].max()),
            any_top_p=bool((host[:, 2] < 1).any()),
            any_min_p=bool((host[:, 1] > 0).any()),
        )

    def penalised_rows(self, slots: np.ndarray) -> np.ndarray:
        return np.flatnonzero(self._is_penalised[slots])

    def penalties(self, slots: np.ndarray) -> Penalties:
        """Of slots that are all penalised."""
        floats = to_device(self._floats[slots], self._device)
        in_prompt, counts = zip(*(self._counts[slot] for slot in slots.tolist()), strict=True)
        return Penalties(floats[:, 3], floats[:, 4], floats[:, 5], torch.stack(in_prompt), torch.stack(counts))

    def count(self, slots: np.ndarray, tokens: torch.Tensor) -> None:
        """Adds the sampled tokens to the counts of the penalised rows among `slots`."""
        for row in self.penalised_rows(slots).tolist():
            counts = self._counts[int(slots[row])][1]
            counts.index_add_(0, tokens[row : row + 1], torch.ones(1, dtype=torch.int32, device=counts.device))
