"""A worker group that models memory exactly, and fails loudly when a plan breaks a rule of the step.

Instead of keys and values a position of a page holds the hash of all tokens up to it. So every row can be asked, at every step, whether
what it reads is what its own prefix would have written, and tokens are a pure function of that hash. Steps run in order but late; copies
run in any order: a load from the moment its plan is submitted, a save once its plan has run.
"""

from __future__ import annotations

import random
import struct
from array import array
from collections import defaultdict, deque
from dataclasses import dataclass, field

from cache_store.keys import Layout
from workers.step import ArenaSpec, BlockCopy, CopyResult, GroupInfo, RowResult, StepPlan, StepResult

NUM_PARTS = 2
VOCAB = 50


def extend_chain(chain: list[int], tokens: list[int]) -> None:
    """One hash per position, each of everything up to it."""
    previous = chain[-1] if chain else 1
    for token in tokens:
        previous = hash((previous, token))
        chain.append(previous)


def next_token(prefix_hash: int) -> int:
    return (prefix_hash >> 7) % VOCAB


def checksums_of(content: tuple[int, ...]) -> bytes:
    return struct.pack("<Q", hash(content) & (1 << 64) - 1) * NUM_PARTS


def make_info(
    num_pages: int,
    block_size: int = 4,
    max_model_len: int = 64,
    weights_digest: bytes | None = b"weights",
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
) -> GroupInfo:
    layout = Layout("gqa", 0, block_size, "float32", NUM_PARTS, (1, 2, block_size, 1))
    return GroupInfo(
        num_pages,
        block_size,
        max_model_len,
        VOCAB,
        layout,
        b"{}",
        weights_digest,
        "float32",
        max_num_seqs,
        max_num_batched_tokens,
        768,
        [(1, 1)],
    )


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Slot:
    generation: int = 0
    content: tuple[int, ...] | None = None


@dataclass
class Arena:
    """The store's memory. A restart makes a new one; copies sent before mean the old one."""

    path: str
    slots: dict[int, Slot] = field(default_factory=dict)


@dataclass
class _Row:
    tokens: list[int]
    num_prompt: int
    computed: int
    pages: list[int]
    sampling: object
    chain: list[int]
    is_void: bool  # some of its pages could not be loaded: it computes nonsense


@dataclass
class _Copy:
    sequence: int
    copy: BlockCopy
    is_load: bool
    arena: Arena | None


class SimulatedGroup:
    """`poll` runs what has been launched: some of it when asked without patience, at least something when asked to wait."""

    def __init__(self, info: GroupInfo, rng: random.Random, clock: Clock, *, copy_failures: float = 0.0, lateness: float = 0.5) -> None:
        self.info = info
        self.num_steps = 0
        self.num_computed_tokens = 0
        self.arenas: dict[str, Arena] = {}
        self.woken = False
        self.failure: Exception | None = None
        self._rng, self._clock = rng, clock
        self._copy_failures, self._lateness = copy_failures, lateness
        self._memory: list[list[int | None]] = [[None] * info.block_size for _ in range(info.num_pages)]
        self._rows: dict[int, _Row] = {}
        self._holders: dict[int, set[int]] = defaultdict(set)  # page -> rows of the batch, as executed
        self._tables: dict[int, list[int]] = {}  # row -> pages, as launched
        self._launched: deque[StepPlan] = deque()
        self._touched: dict[int, dict[int, set[int]]] = {}  # plans without a result -> page -> rows that name it
        self._copies: list[_Copy] = []
        self._done: list[StepResult | CopyResult] = []
        self._sequence = 0
        self._arena: Arena | None = None
        self._row_ids: set[int] = set()
        self._bad_pages: set[int] = set()  # that the last load has left in pieces
        self.num_ahead = self.num_void_rows = 0  # plans that came ahead of loads they wait for; rows of these that read bad pages

    @property
    def is_idle(self) -> bool:
        return not (self._launched or self._copies or self._done)

    def copies_on(self, offset: int, path: str) -> int:
        return sum(1 for copy in self._copies if copy.copy.offset == offset and copy.arena and copy.arena.path == path)

    def submit(self, plan: StepPlan) -> None:
        assert plan.sequence == self._sequence + 1
        assert plan.rows or plan.loads or plan.saves, "an empty plan"
        self._sequence = plan.sequence
        self._launch(plan)
        self._launched.append(plan)
        for copy in plan.loads:
            own = plan.sequence if plan.waits else None
            named = [sequence for sequence, touched in self._touched.items() if copy.page in touched and sequence != own]
            assert not named, f"page {copy.page} is loaded while launched steps {named} name it"
            assert not any(other.copy.page == copy.page for other in self._copies), f"page {copy.page} is being copied already"
        for copy in plan.saves:
            assert not any(other.copy.page == copy.page and other.is_load for other in self._copies)
        self._copies += [_Copy(plan.sequence, copy, True, self._arena) for copy in plan.loads]
        self.num_ahead += plan.waits and any(copy.is_load for copy in self._copies)
        self._copies += [_Copy(plan.sequence, copy, False, self._arena) for copy in plan.saves]

    def _launch(self, plan: StepPlan) -> None:
        """Follows the tables in launch order: what a step writes, no other launched step may name, and no copy may use."""
        for row_id in plan.rows_out:
            del self._tables[row_id]
        for row in plan.rows_in:
            self._tables[row.row_id] = list(row.pages)
        assert len(self._tables) <= self.info.max_num_seqs, "more rows than there is room for"
        assert sum(row.num_query_tokens for row in plan.rows) <= self.info.max_num_batched_tokens, "a step over the token limit"
        touched: dict[int, set[int]] = defaultdict(set)
        copied = {copy.copy.page for copy in self._copies}
        for row in plan.rows:
            new = set(row.new_pages)
            self._tables[row.row_id] += row.new_pages
            for page in self._tables[row.row_id]:
                touched[page].add(row.row_id)
            for page in new:
                assert page not in copied, f"page {page} is allocated while a copy uses it"
                for sequence, named in self._touched.items():
                    assert page not in named, f"page {page} is allocated again while step {sequence} names it"
        for row in plan.rows_in:
            first_own = row.num_computed_tokens // self.info.block_size
            loading = {copy.page for copy in plan.loads} | {copy.copy.page for copy in self._copies if copy.is_load}
            assert plan.waits or loading.isdisjoint(row.pages[:first_own]), f"row {row.row_id} would read pages that are being loaded"
            for page in row.pages[first_own:]:
                assert page not in copied, f"page {page} is allocated while a copy uses it"
                for sequence, named in self._touched.items():
                    assert page not in named, f"page {page} is allocated again while step {sequence} names it"
        self._touched[plan.sequence] = touched

    def poll(self, timeout_s: float) -> list[StepResult | CopyResult]:
        if self.failure:
            raise self.failure
        if timeout_s <= 0:
            if self._rng.random() < self._lateness:
                self._work()
        elif self._launched or self._copies:
            while not self._done:
                self._work()
        elif not self._done and not self.woken:
            self._clock.now_s += min(timeout_s, 0.01)
        self.woken = False
        self._clock.now_s += 0.0005
        count = self._rng.randint(1, len(self._done)) if self._done else 0
        done, self._done = self._done[:count], self._done[count:]
        for result in done:
            if isinstance(result, StepResult):
                del self._touched[result.sequence]
        return done

    def wake(self) -> None:
        self.woken = True

    def attach_arena(self, arena: ArenaSpec) -> None:
        self._arena = self.arenas.setdefault(arena.path, Arena(arena.path))

    def close(self) -> None:
        pass

    def _work(self) -> None:
        """One thing that a group could do next."""
        next_sequence = self._launched[0].sequence if self._launched else self._sequence + 1
        ready = [copy for copy in self._copies if copy.is_load or copy.sequence < next_sequence]
        awaited = [copy for copy in self._copies if copy.is_load and copy.sequence <= next_sequence]
        is_held = bool(awaited) and bool(self._launched) and self._launched[0].waits
        if self._launched and not is_held and (not ready or self._rng.random() < 0.6):
            self._execute(self._launched.popleft())
        elif ready:
            copy = self._rng.choice(ready)
            self._copies.remove(copy)
            self._done.append(self._load(copy) if copy.is_load else self._save(copy))

    def _execute(self, plan: StepPlan) -> None:
        size = self.info.block_size
        for row_id in plan.rows_out:
            for page in self._rows.pop(row_id).pages:
                self._holders[page].discard(row_id)
        for new in plan.rows_in:
            assert new.row_id not in self._row_ids, "a row id came back"
            self._row_ids.add(new.row_id)
            tokens = list(array("I", new.token_ids))
            chain: list[int] = []
            extend_chain(chain, tokens)
            assert 0 <= new.num_computed_tokens < len(tokens)
            assert new.num_computed_tokens % size == 0
            is_void = plan.waits and not self._bad_pages.isdisjoint(new.pages[: new.num_computed_tokens // size])
            self.num_void_rows += is_void
            self._rows[new.row_id] = _Row(
                tokens, new.num_prompt_tokens, new.num_computed_tokens, list(new.pages), new.sampling, chain, is_void
            )
            for page in new.pages:
                self._holders[page].add(new.row_id)
        results = []
        for step_row in plan.rows:
            row = self._rows[step_row.row_id]
            for page in step_row.new_pages:
                row.pages.append(page)
                self._holders[page].add(step_row.row_id)
            results.append(self._compute(step_row.row_id, row, step_row.num_query_tokens))
        self.num_steps += 1
        self._done.append(StepResult(plan.sequence, results, 0.001))

    def _compute(self, row_id: int, row: _Row, count: int) -> RowResult:
        size, start, end = self.info.block_size, row.computed, row.computed + count
        assert start < end <= len(row.tokens), "a step past the known tokens"
        assert end <= self.info.max_model_len, "a step past the context"
        assert 0 not in row.pages
        assert len(set(row.pages)) == len(row.pages)
        if not row.is_void:
            self._check_reads(row_id, row)
        copied = {copy.copy.page for copy in self._copies}
        for position in range(start, end):
            page = row.pages[position // size]
            assert self._holders[page] == {row_id}, f"row {row_id} writes page {page}, which {self._holders[page]} hold"
            assert page not in copied, f"row {row_id} writes page {page} while a copy uses it"
            self._memory[page][position % size] = row.chain[position] if not row.is_void else None
            self._bad_pages.discard(page)
        row.computed = end
        self.num_computed_tokens += count
        scored = self._score(row, start, end)
        if end < len(row.tokens):
            return RowResult(row_id, [], None, scored)
        token = next_token(row.chain[-1] + row.is_void)
        row.tokens.append(token)
        extend_chain(row.chain, [token])
        logprobs = [[(token, -1.0)]] if row.sampling.num_logprobs is not None else None
        return RowResult(row_id, [token], logprobs, scored)

    def _check_reads(self, row_id: int, row: _Row) -> None:
        size = self.info.block_size
        for index in range(-(-row.computed // size)):
            length = min(size, row.computed - index * size)
            content = self._memory[row.pages[index]][:length]
            assert content == row.chain[index * size : index * size + length], f"row {row_id} reads a prefix that is not its own"

    def _score(self, row: _Row, start: int, end: int) -> list[list[tuple[int, float]]] | None:
        """The logprob of a position is its number: tests can see which positions were scored."""
        if row.sampling.num_prompt_logprobs is None:
            return None
        first = max(row.sampling.prompt_logprobs_start, start + 1)
        scored = [[(row.tokens[position], float(position))] for position in range(first, min(end, row.num_prompt - 1) + 1)]
        return scored or None

    def _fails(self, copy: _Copy) -> str:
        slot = copy.arena.slots.get(copy.copy.offset) if copy.arena else None
        if slot is None:
            return "arena"
        if slot.generation != copy.copy.generation:
            return "generation"
        if self._clock() > copy.copy.deadline_s:
            return "deadline"
        return "checksum" if self._rng.random() < self._copy_failures else ""

    def _load(self, copy: _Copy) -> CopyResult:
        page = copy.copy.page
        earlier = [touched for sequence, touched in self._touched.items() if sequence < copy.sequence]  # later ones wait for it
        assert not self._holders[page] or not any(page in touched for touched in earlier)
        reason = self._fails(copy)
        if not reason:
            content = copy.arena.slots[copy.copy.offset].content
            if content is None or checksums_of(content) != copy.copy.checksums:
                reason = "checksum"
            else:
                self._memory[page] = list(content)
                self._bad_pages.discard(page)
        if reason:
            self._bad_pages.add(page)
            self._memory[page] = [self._rng.getrandbits(60) for _ in range(self.info.block_size)]  # half a copy
        return CopyResult(copy.copy.copy_id, not reason, b"", reason)

    def _save(self, copy: _Copy) -> CopyResult:
        reason = self._fails(copy)
        if reason:
            return CopyResult(copy.copy.copy_id, False, b"", reason)
        content = tuple(self._memory[copy.copy.page])
        copy.arena.slots[copy.copy.offset].content = content
        return CopyResult(copy.copy.copy_id, True, checksums_of(content))
