"""The batch a rank keeps, under random plans, against a model that keeps every row as plain lists."""

import numpy as np
import pytest
import torch

from workers.batch import Batch, GraphInputs
from workers.graphs import captured_pages
from workers.step import NULL_PAGE, NewRow, SamplingSettings, StepPlan, StepRow

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BLOCK = 4
MAX_LEN = 40
MAX_SEQS = 5
GREEDY = SamplingSettings(temperature=0.0)


class NaiveRow:
    def __init__(self, tokens: list[int], num_prompt: int, num_computed: int, pages: list[int]) -> None:
        self.tokens, self.num_prompt, self.num_computed, self.pages = tokens, num_prompt, num_computed, pages


def new_row(row_id: int, row: NaiveRow, sampling: SamplingSettings = GREEDY) -> NewRow:
    tokens = np.array(row.tokens, "<u4").tobytes()
    return NewRow(row_id, tokens, row.num_prompt, row.num_computed, list(row.pages), sampling)


def check_step(step, plan: StepPlan, rows: dict[int, NaiveRow]) -> None:
    """Every token of the step is where its row says; rows are found again by their first page and position."""
    attention = step.attention
    queries = np.diff(attention.query_starts).tolist()
    expected = {
        (row.tokens[row.num_computed], row.num_computed, tuple(row.pages)): (planned, row)
        for planned, row in ((planned, rows[planned.row_id]) for planned in plan.rows)
    }
    sampled = dict(zip(step.sampled_plan_rows.tolist(), zip(step.sampled_tokens.tolist(), step.output_positions, strict=True), strict=True))
    seen = []
    for index, num_queries in enumerate(queries):
        start, stop = attention.query_starts[index : index + 2]
        table = attention.block_table[index].tolist()
        position = int(step.positions[start])
        planned, row = next(
            value
            for (_, at, pages), value in expected.items()
            if at == position and list(pages)[: len(table)] == table[: len(pages)] and value[0].row_id not in seen
        )
        seen.append(planned.row_id)
        known = row.tokens[position : position + num_queries]
        assert num_queries == planned.num_query_tokens
        assert step.ids[start:stop].tolist() == known
        assert step.positions[start:stop].tolist() == list(range(position, position + num_queries))
        assert attention.seq_lens[index] == int(attention.device_seq_lens[index]) == position + num_queries
        places = [divmod(p, BLOCK) for p in range(position, position + num_queries)]
        assert attention.pages[start:stop].tolist() == [row.pages[block] for block, _ in places]
        assert attention.offsets[start:stop].tolist() == [offset for _, offset in places]
        assert all(page == NULL_PAGE for page in table[len(row.pages) :])
        is_last = position + num_queries == len(row.tokens)
        assert (index < attention.num_decode_rows) == (num_queries == 1 and is_last)
        plan_row = plan.rows.index(planned)
        assert (plan_row in sampled) == is_last
        if is_last:
            assert sampled[plan_row] == (stop - 1, len(row.tokens) - row.num_prompt)
    assert sorted(seen) == sorted(planned.row_id for planned in plan.rows)
    assert queries[attention.num_decode_rows :] == sorted(queries[attention.num_decode_rows :])


@pytest.mark.parametrize("seed", range(20))
def test_random_plans(seed):
    rng = np.random.RandomState(seed)
    batch = Batch(MAX_SEQS, MAX_LEN, BLOCK, 50, torch.device("cpu"))
    rows: dict[int, NaiveRow] = {}
    next_id, next_page = 1, 1

    def pages_for(length: int, have: int) -> list[int]:
        nonlocal next_page
        pages = list(range(next_page, next_page + max(0, -(-length // BLOCK) - have)))
        next_page += len(pages)
        return pages

    for sequence in range(60):
        leaving = [row_id for row_id in rows if rng.rand() < 0.1 or len(rows[row_id].tokens) >= MAX_LEN]
        for row_id in leaving:
            del rows[row_id]
        entering = []
        while len(rows) < MAX_SEQS and rng.rand() < 0.4:
            length = rng.randint(1, 25)
            num_prompt = rng.randint(1, length + 1)  # the rest are outputs of an earlier admission
            num_computed = int(rng.choice([0, (length - 1) // BLOCK * BLOCK, length - 1]))
            row = NaiveRow(rng.randint(0, 50, length).tolist(), num_prompt, num_computed, pages_for(num_computed, 0))
            rows[next_id] = row
            entering.append(new_row(next_id, row))
            next_id += 1
        running = []
        for row_id in rng.permutation(list(rows)).tolist():
            if rng.rand() < 0.8:
                row = rows[row_id]
                count = rng.randint(1, len(row.tokens) - row.num_computed + 1)
                pages = pages_for(row.num_computed + count, len(row.pages))
                row.pages = row.pages + pages
                running.append(StepRow(row_id, count, 0, 0, pages))
        plan = StepPlan(sequence + 1, leaving, entering, running, [], [])
        step = batch.apply(plan)
        assert (step is None) == (not running)
        if step is None:
            continue
        check_step(step, plan, rows)
        tokens = rng.randint(0, 50, len(step.sampled_slots))
        batch.last_tokens[torch.from_numpy(step.sampled_slots)] = torch.from_numpy(tokens)
        for planned in running:
            rows[planned.row_id].num_computed += planned.num_query_tokens
        for plan_row, token in zip(step.sampled_plan_rows.tolist(), tokens.tolist(), strict=True):
            rows[running[plan_row].row_id].tokens.append(token)


def test_pages_begun_but_not_filled_are_reported_once():
    batch = Batch(1, MAX_LEN, BLOCK, 50, torch.device("cpu"))
    row = NaiveRow(list(range(10)), 10, 0, [7, 8, 9])
    batch.apply(StepPlan(1, [], [new_row(1, row)], [], [], []))
    for count, started in ((3, [7]), (1, []), (4, []), (2, [9]), (1, []), (1, [])):  # positions 0-2, 3, 4-7, 8-9, 10, 11
        assert batch.apply(StepPlan(2, [], [], [StepRow(1, count, 0, 0, [])], [], [])).started_pages.tolist() == started


@pytest.mark.parametrize(
    ("start", "chunks", "expected"),
    [(0, [4, 6], [(1, 4), (5, 9)]), (7, [4, 6], [(7, 9)]), (6, [6, 4], [(6, 6), (7, 9)]), (40, [10], []), (0, [9, 1], [(1, 9)])],
)
def test_prompt_positions_are_scored_by_the_logits_before_them(start, chunks, expected):
    """`expected`: first and last scored position of every step that scores any."""
    batch = Batch(1, MAX_LEN, BLOCK, 50, torch.device("cpu"))
    settings = SamplingSettings(num_prompt_logprobs=2, prompt_logprobs_start=start)
    row = NaiveRow(list(range(20, 30)), 10, 0, [7, 8, 9])
    rows_in, scored, before = [new_row(1, row, settings)], [], 0
    for count in chunks:
        step = batch.apply(StepPlan(1, [], rows_in, [StepRow(1, count, 0, 0, [])], [], []))
        for scores in step.prompt_scores:
            scored.append((int(scores.targets[0]) - 20, int(scores.targets[-1]) - 20))
            assert [before + token + 1 for token in scores.tokens] == (scores.targets - 20).tolist()
        rows_in, before = [], before + count
    assert scored == expected


def test_plans_that_cannot_be_are_refused():
    batch = Batch(2, MAX_LEN, BLOCK, 50, torch.device("cpu"))
    batch.apply(StepPlan(1, [], [new_row(1, NaiveRow([1, 2, 3], 3, 0, [1]))], [], [], []))
    with pytest.raises(AssertionError, match="does not have"):
        batch.apply(StepPlan(2, [], [], [StepRow(1, 4, 0, 0, [])], [], []))
    with pytest.raises(AssertionError, match="in the batch already"):
        batch.apply(StepPlan(2, [], [new_row(1, NaiveRow([1], 1, 0, [2]))], [], [], []))
    with pytest.raises(KeyError):
        batch.apply(StepPlan(2, [9], [], [], [], []))
    batch.apply(StepPlan(2, [1], [new_row(2, NaiveRow(list(range(9)), 9, 0, [1]))], [], [], []))
    with pytest.raises(AssertionError, match="beyond its pages"):
        batch.apply(StepPlan(3, [], [], [StepRow(2, 9, 0, 0, [])], [], []))


def test_captured_steps_are_padded():
    """Decode rows alone, and one rest of a prompt alone, go to the smallest graph that holds them; everything else to none."""
    device = torch.device("cpu")
    batch = Batch(MAX_SEQS, MAX_LEN, BLOCK, 100, device)
    batch.decode_graphs = [GraphInputs(size, size, size * batch.max_blocks, batch.null_slot, device) for size in (2, 4)]
    shapes = [(8, 4), (8, batch.max_blocks), (16, 4), (16, batch.max_blocks)]
    batch.prompt_graphs = [GraphInputs(1, size, num_pages, batch.null_slot, device) for size, num_pages in shapes]

    def apply(rows_in: list[NewRow], sizes: dict[int, int]):
        return batch.apply(StepPlan(0, [], rows_in, [StepRow(row_id, size, 0, 0, []) for row_id, size in sizes.items()], [], []))

    tokens = list(range(20, 38))
    prompt = NaiveRow(tokens, len(tokens), 6, [5, 6, 7, 8, 9])
    part = apply([new_row(0, prompt)], {0: 3})  # not the end of the prompt: there is nothing to sample
    assert part.graph is None
    rest = apply([], {0: 9})
    graph, attention = rest.graph, rest.attention
    assert graph is batch.prompt_graphs[3], "of 9 tokens, and of 5 pages"
    assert rest.ids.tolist() == [*tokens[9:], *[0] * 7]
    assert rest.positions.tolist() == [*range(9, 18), *[0] * 7]
    assert attention.pages.tolist() == [7, 7, 7, 8, 8, 8, 8, 9, 9, *[NULL_PAGE] * 7]
    assert attention.offsets.tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 1, *[0] * 7]
    assert (attention.num_decode_rows, attention.query_starts, list(attention.seq_lens)) == (0, [0, 9], [18])
    assert (attention.kv_starts.tolist(), attention.kv_pages.tolist()) == ([0, 5], prompt.pages)
    assert (graph.last.tolist(), graph.seq_lens.tolist(), rest.sampled_device_slots.tolist()) == ([8], [18], rest.sampled_slots.tolist())

    others = [NaiveRow([1, 2, 3], 3, 2, [10]), NaiveRow([4, 5, 6, 7, 8], 5, 4, [11, 12])]
    outputs = apply([new_row(1, others[0]), new_row(2, others[1])], {0: 1, 1: 1, 2: 1})
    assert outputs.graph is batch.decode_graphs[1]
    assert outputs.attention.num_decode_rows == 4
    assert [step.attention.has_gates for step in (part, rest, outputs)] == [True, True, False], "which would be paid for in each step"
    assert sorted(outputs.attention.seq_lens) == [1, 3, 5, 19]
    assert outputs.attention.kv_pages.tolist() == [10, 11, 12, *prompt.pages, NULL_PAGE]
    assert outputs.graph.slots.tolist()[3] == batch.null_slot
    assert outputs.positions.tolist() == [2, 4, 18, 0]

    short = NaiveRow([1, 2, 3, 4, 5, 6, 7, 8], 8, 0, [15, 16])
    plan = StepPlan(0, [0, 1, 2], [new_row(5, short)], [StepRow(5, 8, 0, 0, [])], [], [])
    assert batch.apply(plan).graph is batch.prompt_graphs[0]
    two = [NaiveRow([1, 2, 3], 3, 0, [13]), NaiveRow([1, 2, 3], 3, 0, [14])]
    assert apply([new_row(3, two[0]), new_row(4, two[1])], {3: 3, 4: 3}).graph is None  # two prompts
    for size, few_keys, expected in ((8, 16, [4, MAX_LEN // BLOCK]), (8, 0, [MAX_LEN // BLOCK]), (18, 16, [MAX_LEN // BLOCK])):
        assert sorted(captured_pages(size, batch, few_keys)) == expected
    scored = Batch(MAX_SEQS, MAX_LEN, BLOCK, 100, device)
    scored.prompt_graphs = batch.prompt_graphs
    plan = StepPlan(0, [], [new_row(0, two[0], GREEDY._replace(num_prompt_logprobs=1))], [StepRow(0, 3, 0, 0, [])], [], [])
    assert scored.apply(plan).graph is None
