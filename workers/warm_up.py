"""Steps that a rank runs before any request's: what is built, loaded or chosen on first use is then not waited for by anybody.

Their rows lie in the null page, where nothing is read. Together they go every way through a step: prompts short enough for captured pieces
and longer ones, outputs alone and beside a prompt, each kind of sampling.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from workers.step import NULL_PAGE, NewRow, SamplingSettings, StepPlan, StepRow

_SHORT_PROMPTS = (40, 20, 30)
_SAMPLING = (
    SamplingSettings(temperature=0.0),
    SamplingSettings(temperature=0.8),
    SamplingSettings(1.1, 0.1, 0.1, 0.8, min_p=0.05, top_k=20, top_p=0.9, num_logprobs=1),
)


def first_plans(max_num_seqs: int, max_tokens: int, max_model_len: int, block_size: int, long_prompt: int) -> Iterator[StepPlan]:
    """Plans to execute one after the other, the last of which leaves no row. `max_tokens` of one step; `long_prompt`: a length that no
    captured piece takes."""
    num_rows = max(1, min(len(_SHORT_PROMPTS), max_num_seqs - 1, max_tokens))
    longest = max(1, min(max_tokens // num_rows, max_model_len - 4))

    def row(row_id: int, length: int, sampling: SamplingSettings) -> tuple[NewRow, StepRow]:
        num_pages = -(-(length + 4) // block_size)
        tokens = np.zeros(length, "<u4").tobytes()
        return NewRow(row_id, tokens, length, 0, [NULL_PAGE] * num_pages, sampling), StepRow(row_id, length, 0, 0, [])

    rows = [row(i, min(length, longest), _SAMPLING[i]) for i, length in enumerate(_SHORT_PROMPTS[:num_rows])]
    outputs = [StepRow(new.row_id, 1, 0, 0, []) for new, _ in rows]
    yield StepPlan(0, [], [new for new, _ in rows], [step for _, step in rows], [], [])
    yield StepPlan(0, [], [], outputs[:1], [], [])
    yield StepPlan(0, [], [], outputs, [], [])
    if num_rows < min(max_num_seqs, max_tokens):
        last = row(num_rows, min(70, longest, max_tokens - num_rows), _SAMPLING[0])
        yield StepPlan(0, [], [last[0]], [*outputs, last[1]], [], [])
        rows.append(last)
    length = max(1, min(long_prompt, max_tokens, max_model_len - 4))
    new, step = row(len(rows), length, _SAMPLING[0])
    yield StepPlan(0, [new.row_id for new, _ in rows], [new], [step], [], [])
    yield StepPlan(0, [new.row_id], [], [], [], [])
