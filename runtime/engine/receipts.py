"""What a request's prompt cost: which of its tokens were reused, and why the others were not.

Written once, at first admission, when it is known what is reused. Every prompt token is counted once, as cached or under one reason:

    prompt blocks    |-- reused --|-- not found: store_unavailable, evicted, other_namespace or cold --|-- scored --|-- partial_block --|

What the reasons can and cannot know is said at `runtime.request.NotReused`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from cache_store.keys import BlockKey
from runtime.request import NotReused, Receipt

if TYPE_CHECKING:
    from runtime.engine.block_manager import BlockManager
    from runtime.engine.live import LiveRequest

MAX_FIRST_BLOCKS = 4096
MAX_ROOTS = 8  # remembered per first block


class FirstBlocks:
    """First blocks of prompts that were admitted, by their tokens, and the roots they were seen under. The latest ones only."""

    def __init__(self) -> None:
        self._roots: OrderedDict[bytes, OrderedDict[BlockKey, None]] = OrderedDict()

    def is_only_elsewhere(self, tokens: bytes, root: BlockKey) -> bool:
        roots = self._roots.get(tokens)
        return roots is not None and root not in roots

    def note(self, tokens: bytes, root: BlockKey) -> None:
        roots = self._roots.setdefault(tokens, OrderedDict())
        self._roots.move_to_end(tokens)
        roots[root] = None
        roots.move_to_end(root)
        if len(roots) > MAX_ROOTS:
            roots.popitem(last=False)
        if len(self._roots) > MAX_FIRST_BLOCKS:
            self._roots.popitem(last=False)


def make_receipt(request: LiveRequest, num_hits: int, blocks: BlockManager, first_blocks: FirstBlocks, *, prefix_caching: bool) -> Receipt:
    """Of a request that is being admitted with `num_hits` reused blocks; its `cached` is set."""
    assert request.cached is not None
    num_computed = request.num_prompt - request.cached.total
    if not prefix_caching:
        return Receipt(num_computed, 0, {NotReused.CACHING_OFF.value: num_computed})
    size, num_prompt = blocks.block_size, request.num_prompt
    num_reusable = request.num_reusable_blocks(size)
    reasons: Counter[str] = Counter()
    first = request.tokens[:size].tobytes()
    fallback = NotReused.COLD
    if not num_hits and first_blocks.is_only_elsewhere(first, request.root):
        fallback = NotReused.OTHER_NAMESPACE
    for index in range(num_hits, min(num_reusable, -(-num_prompt // size))):
        reason = _store_reason(request, index)
        if reason is None:
            reason = NotReused.EVICTED if blocks.was_evicted(request.keys[index]) else fallback
        reasons[reason.value] += min(size, num_prompt - index * size)
    num_scored = max(0, (num_prompt - 1) // size - max(num_reusable, num_hits)) * size
    if num_scored:
        reasons[NotReused.SCORED.value] = num_scored
    num_left = num_computed - reasons.total()
    if num_left:
        reasons[NotReused.PARTIAL_BLOCK.value] = num_left
    if len(request.tokens) >= size:
        first_blocks.note(first, request.root)
    return Receipt(num_computed, request.bytes_loaded, dict(reasons))


def _store_reason(request: LiveRequest, index: int) -> NotReused | None:
    """Why the store did not give this block; None where it does not know it. What it says of an evicted block holds for those behind."""
    verdict = request.store_verdict
    if verdict is not None and verdict.first <= index < verdict.first + verdict.num_cheaper:
        return NotReused.CHEAPER_TO_COMPUTE
    if request.store_failed:
        return NotReused.STORE_UNAVAILABLE
    if verdict is not None and (verdict.is_evicted or index < verdict.first):  # offered, and gone when it was asked for
        return NotReused.EVICTED
    return None
