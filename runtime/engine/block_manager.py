"""Pages: who holds them, what they contain, and when they may be written again.

A page is in exactly one state:

    free      allocatable, content meaningless
    used      held by at least one row, load or save
    cached    nobody's, but published: holds the block of a key; allocatable, the least recently used first
    deferred  nobody's, but a launched step still names it; becomes cached or free with that step's result

A published page may be shared, so nobody writes it: a row writes only behind its last published block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from cache_store.keys import BlockKey
from workers.step import NULL_PAGE

REMEMBERED_PER_PAGE = 4  # keys of evicted blocks


class Published(NamedTuple):
    """What a page holds: the block `key`, number `depth` of its sequence, right behind the block `parent` (or the root)."""

    key: BlockKey
    parent: BlockKey
    depth: int


class BlockManager:
    """Owned by the engine's thread. Callers pin and unpin; a page returns when its last pin is gone and no launched step names it."""

    def __init__(self, num_pages: int, block_size: int) -> None:
        """`num_pages` includes the null page, which is never allocated."""
        self.num_pages = num_pages
        self.block_size = block_size
        self.num_changes = 0  # differs from before when a placement that failed is worth another try
        self.on_publish: Callable[[Published, bool], None] | None = None  # (block, it came from the store)
        self.on_evict: Callable[[BlockKey], None] | None = None
        self._pins = [0] * num_pages
        self._last_step = [0] * num_pages  # the last launched step that named the page
        self._published: list[Published | None] = [None] * num_pages
        self._index: dict[BlockKey, int] = {}
        self._announced: dict[BlockKey, int] = {}  # keys that a running row is about to publish -> its row_id
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._deferred: dict[int, None] = {}  # in the order of their release
        self._confirmed = 0
        self._evicted: OrderedDict[BlockKey, None] = OrderedDict()  # keys whose page was taken for another block; the oldest first

    @property
    def num_available(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and whose content can be reused."""
        return len(self._cached) + sum(1 for page in self._deferred if self._published[page])

    @property
    def num_deferred(self) -> int:
        return len(self._deferred)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - self.num_available - len(self._deferred)

    def allocate(self, count: int) -> list[int]:
        """`count` pages, pinned once, with meaningless content. The caller has looked at `num_available`."""
        assert count <= self.num_available, f"{count} pages were asked for, {self.num_available} are available"
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _none = self._cached.popitem(last=False)
                self._evict(page)
            self._pins[page] = 1
            pages.append(page)
        return pages

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys are published here. Pins nothing."""
        index = self._index
        for count, key in enumerate(keys):
            if key not in index:
                return count
        return len(keys)

    def num_idle(self, keys: Iterable[BlockKey]) -> int:
        """How many of these published blocks are in allocatable pages: pinning them takes as many from `num_available`."""
        return sum(1 for key in keys if self._index[key] in self._cached)

    def pin_published(self, keys: Iterable[BlockKey]) -> list[int]:
        """Pins the pages of keys that are all published."""
        index, pins = self._index, self._pins
        pages = [index[key] for key in keys]
        for page in pages:
            if pins[page]:
                pins[page] += 1
            else:
                self.pin(page)
        return pages

    def pin(self, page: int) -> None:
        """One more holder of a page that is used or published."""
        if not self._pins[page]:
            assert self._published[page], f"page {page} holds nothing"
            if page in self._deferred:
                del self._deferred[page]
            else:
                del self._cached[page]
        self._pins[page] += 1

    def unpin(self, pages: Sequence[int], last_step: int = 0) -> None:
        """Gives pages of one sequence back, its tail first, so that a block is never evicted before the blocks behind it.

        `last_step` is the last launched step in which the holder's row names them.
        """
        pins, last_steps, confirmed = self._pins, self._last_step, self._confirmed
        for page in reversed(pages):
            if last_step > last_steps[page]:
                last_steps[page] = last_step
            left = pins[page] = pins[page] - 1
            if left > 0:
                continue
            assert left == 0, f"page {page} was given back twice"
            if last_steps[page] > confirmed:
                self._deferred[page] = None
            else:
                self._settle(page)

    def confirm(self, sequence: int) -> None:
        """The step `sequence` and all before it are done: what waited for them is allocatable."""
        self._confirmed = sequence
        if self._deferred:
            for page in [page for page in self._deferred if self._last_step[page] <= sequence]:
                del self._deferred[page]
                self._settle(page)

    def publish(self, page: int, block: Published, *, from_store: bool = False) -> bool:
        """Makes a pinned page findable under its key. False where another page already is: then this one stays private."""
        self._announced.pop(block.key, None)
        self._evicted.pop(block.key, None)
        if block.key in self._index:
            return False
        assert self._pins[page], f"page {page} is nobody's, so nobody can vouch for its content"
        assert self._published[page] is None, f"page {page} holds another block already"
        self._index[block.key] = page
        self._published[page] = block
        self.num_changes += 1
        if self.on_publish:
            self.on_publish(block, from_store)
        return True

    def page_of(self, key: BlockKey) -> int | None:
        return self._index.get(key)

    def published_as(self, key: BlockKey) -> Published | None:
        """What the page of that key holds; None where there is none."""
        page = self._index.get(key)
        return None if page is None else self._published[page]

    def num_pins(self, page: int) -> int:
        return self._pins[page]

    def published(self) -> list[Published]:
        """All published blocks, parents before their children."""
        blocks = [block for block in self._published if block]
        blocks.sort(key=lambda block: block.depth)
        return blocks

    def forget_published(self) -> None:
        """Empties the index, for a new root: cached pages become free, used ones may be published again under new keys."""
        for page in list(self._index.values()):
            self._unpublish(page)
        self._free.extend(self._cached)
        self._cached.clear()
        self._announced.clear()
        self._evicted.clear()

    def announce(self, keys: Iterable[BlockKey], row_id: int) -> None:
        """A row begins to compute these blocks; a request that needs one can wait for it instead of computing it too."""
        for key in keys:
            if key not in self._index:
                self._announced.setdefault(key, row_id)

    def withdraw(self, keys: Iterable[BlockKey], row_id: int) -> None:
        """The row will not publish what it has announced and not published."""
        for key in keys:
            if self._announced.get(key) == row_id:
                del self._announced[key]

    def is_announced(self, key: BlockKey) -> bool:
        return key in self._announced

    def was_evicted(self, key: BlockKey) -> bool:
        """Whether a page has held the block, lately, and was then taken for another one."""
        return key in self._evicted

    def _evict(self, page: int) -> None:
        block = self._published[page]
        assert block is not None
        self._evicted[block.key] = None
        if len(self._evicted) > REMEMBERED_PER_PAGE * self.num_pages:
            self._evicted.popitem(last=False)
        self._unpublish(page)

    def _settle(self, page: int) -> None:
        self.num_changes += 1
        if self._published[page]:
            self._cached[page] = None
        else:
            self._free.append(page)

    def _unpublish(self, page: int) -> None:
        block = self._published[page]
        assert block is not None
        del self._index[block.key]
        self._published[page] = None
        if self.on_evict:
            self.on_evict(block.key)

    def check(self) -> list[str]:
        """Every violated invariant, in words; empty when all is well."""
        problems = []
        free, cached, deferred = set(self._free), set(self._cached), set(self._deferred)
        if len(free) != len(self._free):
            problems.append("a page is on the free list twice")
        for page in range(1, self.num_pages):
            states = [page in free, page in cached, page in deferred, self._pins[page] > 0]
            if sum(states) != 1:
                problems.append(f"page {page} is in {sum(states)} states: free, cached, deferred, used = {states}")
            if page in cached and not self._published[page]:
                problems.append(f"page {page} is cached but holds nothing")
            if page in free and self._published[page]:
                problems.append(f"page {page} is free but published")
            if (page in free or page in cached) and self._last_step[page] > self._confirmed:
                problems.append(f"page {page} is allocatable, but step {self._last_step[page]} still names it")
            if page in deferred and self._last_step[page] <= self._confirmed:
                problems.append(f"page {page} is deferred for step {self._last_step[page]}, which is done")
        if self._pins[NULL_PAGE] or NULL_PAGE in free | cached | deferred or self._published[NULL_PAGE]:
            problems.append("the null page is in use")
        for key, page in self._index.items():
            block = self._published[page]
            if block is None or block.key != key:
                problems.append(f"the index says that page {page} holds {key.hex()}, the page says {block}")
        if len(self._index) != sum(1 for block in self._published if block):
            problems.append("a published page is not in the index")
        if any(key in self._index for key in self._evicted):
            problems.append("a key is both published and evicted")
        announced = [key for key in self._announced if key in self._index]
        if announced:
            problems.append(f"{len(announced)} keys are both announced and published")
        return problems
