"""Prompts that may have ended the replicas they ran on: for a while they are refused, so that they do not end the rest."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

from runtime.errors import SuspectRequest
from runtime.request import ValidRequest

REFUSED_S = 60.0
MAX_SUSPECTS = 1024  # the oldest are forgotten


class Suspects:
    """For one event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s: OrderedDict[bytes, float] = OrderedDict()

    def add(self, request: ValidRequest) -> None:
        identity = _identity(request)
        self._until_s.pop(identity, None)  # they stay in the order of their ends
        self._until_s[identity] = self._clock() + REFUSED_S
        if len(self._until_s) > MAX_SUSPECTS:
            self._until_s.popitem(last=False)

    def check(self, request: ValidRequest) -> None:
        """SuspectRequest when the tenant's prompt is one of them."""
        while self._until_s and next(iter(self._until_s.values())) <= self._clock():
            self._until_s.popitem(last=False)
        if self._until_s and _identity(request) in self._until_s:
            raise SuspectRequest(f"two replicas have ended while they ran this prompt, so it is refused for {REFUSED_S:.0f} s")


def _identity(request: ValidRequest) -> bytes:
    return hashlib.blake2b(request.prompt_token_ids.tobytes(), key=hashlib.sha256(request.tenant.encode()).digest()).digest()
