"""Prompts whose blocks the store is asked to keep, in the background: no request ever waits for its pin.

    WATCHED --prompt computed, or the request's end--> DUE --none of its blocks waits for the store--> LOOKING
                                                       ^ |                                             |  |has all that it will get
                                                       | +--not yet: later and later                   |  v
                                                       +-------lacks some that pages hold: offered-----+ PINNING --> (over)
                                                       +---------------------nothing kept yet------------+

A wish is over when the store keeps something or has no quota left, after its time, or with the loss of the store. The pin itself is the
tenant's: it outlives the request and this engine, until it expires or the store ends.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache_store.keys import BlockKey
from runtime.engine.block_manager import BlockManager
from runtime.engine.config import EngineConfig
from runtime.engine.kv_offers import KvOffers
from runtime.engine.live import LiveRequest, Phase
from runtime.engine.store_port import Lookup, Pin, StoreAnswer, StorePort, StoreState
from runtime.request import PinOutcome, pin_owner

if TYPE_CHECKING:
    from cache_store.client import Found, PinReply

log = logging.getLogger(__name__)

MAX_BACKOFF = 32  # times the first wait between two attempts


@dataclass(slots=True, eq=False)
class _Wish:
    request: LiveRequest
    deadline_s: float
    not_before_s: float
    wait_s: float  # before the next attempt, once this one has come to nothing
    was_offered: bool = False  # what the store lacked was offered once more


class KvPins:
    """Owned by the engine's thread. A wish is either watched, due, or one of the asked."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, port: StorePort, offers: KvOffers) -> None:
        self.num_kept = 0  # pins that the store has granted
        self.num_dropped = 0  # wishes that ended without one
        self._config, self._blocks, self._port, self._offers = config, blocks, port, offers
        self._watched: dict[LiveRequest, None] = {}
        self._due: list[_Wish] = []
        self._looking: dict[int, _Wish] = {}  # by ticket
        self._pinning: dict[int, _Wish] = {}

    @property
    def num_wishes(self) -> int:
        return len(self._watched) + len(self._due) + len(self._looking) + len(self._pinning)

    @property
    def next_deadline_s(self) -> float:
        return min((wish.not_before_s for wish in self._due), default=math.inf)

    def arrived(self, request: LiveRequest) -> None:
        """Takes the request's wish, if it has one, and notes on it what becomes of it."""
        if not request.request.pin_ttl_s:
            return
        if self._port.state is StoreState.NONE or not self._config.prefix_caching:
            request.pin = PinOutcome.NO_STORE
        elif not self._num_blocks(request):
            request.pin = PinOutcome.TOO_SHORT
        elif self.num_wishes >= self._config.max_pin_wishes:
            request.pin = PinOutcome.TOO_MANY
        else:
            request.pin = PinOutcome.TAKEN
            self._watched[request] = None

    def advance(self, now_s: float) -> None:
        """Does what can be done now: wishes whose prompt is there, and questions to the store."""
        for request in list(self._watched):
            if request.phase is Phase.FINISHED or request.num_published >= self._num_blocks(request):
                del self._watched[request]
                self._due.append(_Wish(request, now_s + self._config.pin_timeout_s, now_s, self._config.pin_retry_s))
        if now_s < self.next_deadline_s:
            return
        ready = [wish for wish in self._due if wish.not_before_s <= now_s]
        self._due = [wish for wish in self._due if wish.not_before_s > now_s]
        for wish in ready:
            keys = self._keys(wish)
            is_pending = any(map(self._offers.is_pending, reversed(keys)))  # the last ones are stored last
            ticket = None if is_pending else self._port.ask(Lookup(keys))
            if ticket is None:
                self._later(wish, now_s)
            else:
                self._looking[ticket] = wish

    def answered(self, answer: StoreAnswer, now_s: float) -> bool:
        """Takes the store's answer to a question that was asked here."""
        wish = self._looking.pop(answer.ticket, None)
        if wish:
            self._looked(wish, answer.reply, now_s)  # type: ignore[arg-type]  # the reply to Lookup
            return True
        wish = self._pinning.pop(answer.ticket, None)
        if wish:
            self._pinned(wish, answer.reply, now_s)  # type: ignore[arg-type]  # the reply to Pin
            return True
        return False

    def lost(self) -> None:
        """The store is gone, and with it what it was to keep. Prompts that are still being computed may find the next one."""
        dropped = len(self._due) + len(self._looking) + len(self._pinning)
        if dropped:
            log.warning("%s: %d pins that were asked for are dropped: the store is lost", self._config.replica_id, dropped)
        self.num_dropped += dropped
        self._due.clear()
        self._looking.clear()
        self._pinning.clear()

    def _num_blocks(self, request: LiveRequest) -> int:
        return request.num_prompt // self._blocks.block_size

    def _keys(self, wish: _Wish) -> list[BlockKey]:
        """Of the prompt's full blocks; under the root as it is known by now."""
        request = wish.request
        return request.extend_keys(self._blocks.block_size)[: self._num_blocks(request)]

    def _later(self, wish: _Wish, now_s: float) -> None:
        if now_s >= wish.deadline_s:
            self._give_up(wish, f"the store has none of its blocks after {self._config.pin_timeout_s:g} s")
            return
        wish.not_before_s = min(wish.deadline_s, now_s + wish.wait_s)
        wish.wait_s = min(2 * wish.wait_s, MAX_BACKOFF * self._config.pin_retry_s)
        self._due.append(wish)

    def _give_up(self, wish: _Wish, why: str) -> None:
        self.num_dropped += 1
        log.warning("%s: the pin of request %s is dropped: %s", self._config.replica_id, wish.request.request.request_id, why)

    def _looked(self, wish: _Wish, found: Found | None, now_s: float) -> None:
        """Blocks that the store has lost since, while pages hold them, are offered once more; whatever there is then is pinned."""
        keys = self._keys(wish)
        num_found = found.num_blocks + found.num_cheaper_to_compute if found else 0
        if found is None or self._offer(wish, keys, num_found) or not num_found:
            self._later(wish, now_s)
            return
        request = wish.request.request
        question = Pin(pin_owner(request.tenant), keys, request.pin_ttl_s, self._config.pin_wait_s)
        ticket = self._port.ask(question)
        if ticket is None:
            self._later(wish, now_s)
        else:
            self._pinning[ticket] = wish

    def _offer(self, wish: _Wish, keys: list[BlockKey], num_found: int) -> bool:
        """Offers the blocks behind those found, as far as pages hold them. False when there is nothing to offer, or it was done before."""
        held = self._blocks.match(keys)
        if wish.was_offered or held <= num_found:
            return False
        wish.was_offered = True
        self._offers.offer_again(keys[held - 1])
        return True

    def _pinned(self, wish: _Wish, reply: PinReply | None, now_s: float) -> None:
        if reply is not None and reply.pin_id:
            self.num_kept += 1
        elif reply is not None and reply.over_quota:
            self._give_up(wish, "the store's quotas for pins are used up")
        else:
            self._later(wish, now_s)
