from __future__ import annotations

import random

import pytest
from engine_parts import BLOCK_SIZE, ROOT

from cache_store.keys import BlockKey, chain_keys
from runtime.engine.block_manager import BlockManager, Published


def publish_chain(blocks: BlockManager, pages: list[int], tokens: list[int]) -> list[BlockKey]:
    keys = chain_keys(ROOT, tokens, BLOCK_SIZE)
    for depth, (page, key) in enumerate(zip(pages, keys, strict=True)):
        blocks.publish(page, Published(key, keys[depth - 1] if depth else ROOT, depth))
    return keys


def test_the_null_page_is_never_handed_out() -> None:
    blocks = BlockManager(5, BLOCK_SIZE)
    assert sorted(blocks.allocate(4)) == [1, 2, 3, 4]
    assert blocks.num_available == 0


def test_pages_of_a_launched_step_come_back_with_its_result() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    pages = blocks.allocate(3)
    blocks.unpin(pages, last_step=2)
    blocks.confirm(1)
    assert (blocks.num_available, blocks.num_deferred, blocks.num_used) == (0, 3, 0)
    blocks.confirm(2)
    assert (blocks.num_available, blocks.num_deferred) == (3, 0)
    assert blocks.check() == []


def test_a_shared_page_waits_for_the_last_step_of_all_its_holders() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    (page,) = blocks.allocate(1)
    (key,) = publish_chain(blocks, [page], [1, 2, 3, 4])
    assert blocks.pin_published([key]) == [page]
    blocks.unpin([page], last_step=7)
    blocks.unpin([page], last_step=3)
    blocks.confirm(6)
    assert blocks.num_deferred == 1
    blocks.confirm(7)
    assert blocks.num_cached == 1


def test_a_deferred_page_can_be_shared_at_once() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    pages = blocks.allocate(1)
    keys = publish_chain(blocks, pages, [1, 2, 3, 4])
    blocks.unpin(pages, last_step=5)
    assert blocks.match(keys) == 1
    assert blocks.pin_published(keys) == pages
    assert blocks.num_deferred == 0
    assert blocks.check() == []


def test_eviction_takes_the_tail_of_a_sequence_before_its_head() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    evicted: list[BlockKey] = []
    blocks.on_evict = evicted.append
    pages = blocks.allocate(3)
    keys = publish_chain(blocks, pages, list(range(12)))
    blocks.unpin(pages)
    blocks.allocate(2)
    assert evicted == [keys[2], keys[1]]
    assert blocks.match(keys) == 1


def test_the_least_recently_used_sequence_goes_first() -> None:
    blocks = BlockManager(5, BLOCK_SIZE)
    old, new = blocks.allocate(2), blocks.allocate(2)
    old_keys, new_keys = publish_chain(blocks, old, list(range(8))), publish_chain(blocks, new, list(range(50, 58)))
    blocks.unpin(old)
    blocks.unpin(new)
    blocks.unpin(blocks.pin_published(old_keys))  # used again
    blocks.allocate(2)
    assert (blocks.match(old_keys), blocks.match(new_keys)) == (2, 0)


def test_a_second_page_with_the_same_block_stays_private() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    first, second = blocks.allocate(2)
    publish_chain(blocks, [first], [1, 2, 3, 4])
    key = chain_keys(ROOT, [1, 2, 3, 4], BLOCK_SIZE)[0]
    assert not blocks.publish(second, Published(key, ROOT, 0))
    blocks.unpin([second])
    assert blocks.num_free == 2
    assert blocks.page_of(key) == first


def test_a_new_root_empties_the_index_and_keeps_the_holders() -> None:
    blocks = BlockManager(5, BLOCK_SIZE)
    held, idle = blocks.allocate(1), blocks.allocate(1)
    keys = publish_chain(blocks, held, [1, 2, 3, 4]) + publish_chain(blocks, idle, [5, 6, 7, 8])
    blocks.unpin(idle)
    blocks.forget_published()
    assert [blocks.page_of(key) for key in keys] == [None, None]
    assert (blocks.num_used, blocks.num_cached, blocks.num_free) == (1, 0, 3)
    publish_chain(blocks, held, [1, 2, 3, 4])
    assert blocks.check() == []


def test_misuse_is_caught() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    pages = blocks.allocate(1)
    blocks.unpin(pages)
    with pytest.raises(AssertionError, match="given back twice"):
        blocks.unpin(pages)
    with pytest.raises(AssertionError, match="3 pages|2 are available|are available"):
        blocks.allocate(9)


def test_check_sees_what_is_broken() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    blocks.allocate(1)
    blocks._free.append(blocks._free[0])
    blocks._pins[blocks._free[0]] = 1
    problems = "\n".join(blocks.check())
    assert "twice" in problems
    assert "2 states" in problems


class NaiveBlocks:
    """The same promises, kept by looking at everything every time."""

    def __init__(self, num_pages: int) -> None:
        self.pins = dict.fromkeys(range(1, num_pages), 0)
        self.last_step = dict.fromkeys(range(1, num_pages), 0)
        self.keys: dict[int, BlockKey] = {}
        self.returned_at: dict[int, int] = {}
        self.confirmed = 0
        self.clock = 0

    def idle(self, page: int) -> bool:
        return not self.pins[page] and self.last_step[page] <= self.confirmed

    def counts(self) -> tuple[int, int, int]:
        """(used, cached, free)"""
        used = sum(1 for pins in self.pins.values() if pins)
        cached = sum(1 for page in self.keys if not self.pins[page])
        free = sum(1 for page in self.pins if self.idle(page) and page not in self.keys)
        return used, cached, free


@pytest.mark.parametrize("seed", range(20))
def test_random_use_agrees_with_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    blocks, naive = BlockManager(20, BLOCK_SIZE), NaiveBlocks(20)
    held: list[tuple[list[int], list[BlockKey]]] = []
    step = 0
    for _ in range(400):
        action = rng.choice(("take", "take", "give", "give", "publish", "confirm"))
        if action == "take":
            tokens = [rng.randrange(2) for _ in range(BLOCK_SIZE * rng.randint(1, 4))]
            keys = chain_keys(ROOT, tokens, BLOCK_SIZE)
            hits = blocks.match(keys)
            assert hits == next((i for i, key in enumerate(keys) if key not in naive.keys.values()), len(keys))
            needed = len(keys) - hits
            if blocks.num_available - blocks.num_idle(keys[:hits]) < needed:
                continue
            shared = blocks.pin_published(keys[:hits])
            fresh = blocks.allocate(needed)
            for page in fresh:
                assert naive.idle(page), "a page was handed out that somebody holds or a step names"
                naive.keys.pop(page, None)
                naive.pins[page] = 1
            for page, key in zip(shared, keys, strict=False):
                assert naive.keys[page] == key
                naive.pins[page] += 1
            held.append((shared + fresh, keys))
        elif action == "give" and held:
            pages, _ = held.pop(rng.randrange(len(held)))
            step += rng.random() < 0.5
            blocks.unpin(pages, last_step=step)
            for page in pages:
                naive.pins[page] -= 1
                naive.last_step[page] = max(naive.last_step[page], step)
        elif action == "publish" and held:
            pages, keys = rng.choice(held)
            for depth, (page, key) in enumerate(zip(pages, keys, strict=True)):
                if page not in naive.keys and blocks.publish(page, Published(key, keys[depth - 1] if depth else ROOT, depth)):
                    assert key not in naive.keys.values()
                    naive.keys[page] = key
        elif action == "confirm":
            naive.confirmed = rng.randint(naive.confirmed, step)
            blocks.confirm(naive.confirmed)
        assert blocks.check() == []
        assert (blocks.num_used, blocks.num_cached, blocks.num_free) == naive.counts()
