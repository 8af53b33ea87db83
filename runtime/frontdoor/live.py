"""The requests that have not ended, by tenant and id: refuses a second one of the same name, and one too many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from runtime.errors import DuplicateRequest, Overloaded
from runtime.frontdoor.pipeline import AbortSwitch


class LiveRequests:
    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._switches: dict[tuple[str, str], AbortSwitch] = {}
        self._num_visits = 0

    def __len__(self) -> int:
        return len(self._switches)

    @contextlib.contextmanager
    def admit(self, tenant: str, request_id: str) -> Iterator[AbortSwitch]:
        """Holds the id until the end. DuplicateRequest or Overloaded."""
        name = (tenant, request_id)
        if name in self._switches:
            raise DuplicateRequest(f"request_id: {request_id!r} is in use by a request that has not ended")
        if len(self._switches) >= self._max_requests:
            raise Overloaded(f"{self._max_requests} requests are in progress here, which is the limit; try again later")
        switch = self._switches[name] = AbortSwitch()
        try:
            yield switch
        finally:
            del self._switches[name]

    @contextlib.contextmanager
    def visit(self) -> Iterator[None]:
        """A call that only asks for a moment's work of the front door. Overloaded when as many as may live are waiting for that."""
        if self._num_visits >= self._max_requests:
            raise Overloaded(f"{self._max_requests} calls wait here for the tokenizer, which is the limit; try again later")
        self._num_visits += 1
        try:
            yield
        finally:
            self._num_visits -= 1

    def abort(self, tenant: str, request_id: str) -> bool:
        """False when the tenant has no such request."""
        switch = self._switches.get((tenant, request_id))
        if switch is not None:
            switch.abort()
        return switch is not None
