"""Blocks that this engine has told the store it will compute, so that other replicas wait for them instead of computing them too.

A claim costs the store no memory and ends by itself: with its deadline, with the session of an engine that died, or when the block is
stored. The claims of a request that ends early are given up at once, but for those that another request of this engine has made as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from cache_store.keys import BlockKey
from runtime.engine.live import LiveRequest
from runtime.engine.store_port import Claim, StorePort

GIVE_UP_S = 0.001  # a claim is given up by claiming it for no time


class FlightClaims:
    """Owned by the loads' coordinator."""

    def __init__(self, port: StorePort) -> None:
        self._port = port
        self._by_request: dict[LiveRequest, list[BlockKey]] = {}
        self._num_requests: Counter[BlockKey] = Counter()
        self._to_give_up: dict[BlockKey, None] = {}
        self._giving_up: set[int] = set()  # tickets

    @property
    def num_blocks(self) -> int:
        return len(self._num_requests)

    def asked(self, keys: Sequence[BlockKey]) -> None:
        """A lookup claims those of them that are not stored."""
        for key in keys if self._to_give_up else ():
            self._to_give_up.pop(key, None)

    def hold(self, request: LiveRequest, keys: Sequence[BlockKey]) -> None:
        """The store has granted these, and the request is about to compute them."""
        self.let_go(request, lambda key: True)
        self._by_request[request] = list(keys)
        self._num_requests.update(keys)

    def let_go(self, request: LiveRequest, is_here: Callable[[BlockKey], bool]) -> None:
        """The request is gone, or claims anew. A block that is here will be offered: until it is stored, others had better wait for it."""
        for key in self._by_request.pop(request, ()):
            self._num_requests[key] -= 1
            if not self._num_requests[key]:
                del self._num_requests[key]
                if not is_here(key):
                    self._to_give_up[key] = None

    def give_up(self, keys: Sequence[BlockKey]) -> None:
        """Granted too late: nobody needs them, unless another request claims them too."""
        self._to_give_up.update((key, None) for key in keys if key not in self._num_requests)

    def flush(self) -> None:
        if self._to_give_up:
            ticket = self._port.ask(Claim(list(self._to_give_up), GIVE_UP_S))
            if ticket is not None:
                self._giving_up.add(ticket)
                self._to_give_up.clear()

    def answered(self, ticket: int) -> bool:
        """True when the answer was to a claim that was given up. Nothing depends on it: the claim would have expired anyhow."""
        if ticket in self._giving_up:
            self._giving_up.discard(ticket)
            return True
        return False

    def lost(self) -> None:
        """The store has forgotten all claims."""
        self._by_request.clear()
        self._num_requests.clear()
        self._to_give_up.clear()
        self._giving_up.clear()
