"""What reaches an engine from other threads, and the bound on it."""

from __future__ import annotations

import threading
from typing import NamedTuple

from runtime.engine.config import EngineConfig
from runtime.engine.frames import Load
from runtime.engine.live import EngineRequest, RequestKey
from runtime.errors import DuplicateRequest, GroupFailed, Overloaded


class AbortRequest(NamedTuple):
    key: RequestKey
    reason: str  # as in frames.Abort
    num_output_tokens: int


class DigestKnown(NamedTuple):
    weights_digest: bytes


Message = EngineRequest | AbortRequest | DigestKnown


class Inbox:
    """Thread-safe. Requests count against the bounds from `submit` until their prompt is computed."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._messages: list[Message] = []
        self._live: set[RequestKey] = set()
        self._num_requests = 0  # submitted and not yet part of `_load`
        self._num_tokens = 0
        self._load = Load(0, 0, 0)
        self._closed = ""

    def submit(self, request: EngineRequest) -> None:
        """Overloaded when the queue is full, DuplicateRequest when the id is live in this stream, GroupFailed after the end."""
        with self._lock:
            if self._closed:
                raise GroupFailed(self._closed)
            if request.key in self._live:
                raise DuplicateRequest(f"request id {request.request_id!r} is in use by a live request")
            num_requests = self._num_requests + self._load.num_waiting
            num_tokens = self._num_tokens + self._load.num_queued_tokens
            config = self._config
            if num_requests >= config.max_queued_requests:
                raise Overloaded(
                    f"{num_requests} requests wait for this replica, its bound is {config.max_queued_requests}", config.retry_after_ms
                )
            if num_tokens and num_tokens + request.num_tokens > config.max_queued_tokens:
                raise Overloaded(
                    f"{num_tokens} prompt tokens wait for this replica and {request.num_tokens} more would pass its bound of"
                    f" {config.max_queued_tokens}",
                    config.retry_after_ms,
                )
            self._live.add(request.key)
            self._num_requests += 1
            self._num_tokens += request.num_tokens
            self._messages.append(request)

    def abort(self, key: RequestKey, reason: str, num_output_tokens: int) -> bool:
        """False when no such request is live."""
        with self._lock:
            if key not in self._live:
                return False
            self._messages.append(AbortRequest(key, reason, num_output_tokens))
            return True

    def digest_known(self, weights_digest: bytes) -> None:
        with self._lock:
            self._messages.append(DigestKnown(weights_digest))

    def live_in(self, stream: int) -> list[str]:
        """Ids of the live requests of one stream."""
        with self._lock:
            return [request_id for number, request_id in self._live if number == stream]

    def take(self) -> list[Message]:
        """Everything since the last call, in order. The engine's thread; `settle` follows once the messages are part of the load."""
        if not self._messages:
            return []
        with self._lock:
            messages, self._messages = self._messages, []
        return messages

    def settle(self, taken: list[Message], load: Load) -> None:
        """The taken requests are counted in `load` from now on."""
        with self._lock:
            for message in taken:
                if isinstance(message, EngineRequest):
                    self._num_requests -= 1
                    self._num_tokens -= message.num_tokens
            self._load = load

    def ended(self, key: RequestKey) -> None:
        with self._lock:
            self._live.discard(key)

    def close(self, reason: str) -> list[Message]:
        """Refuses everything from now on. Returns what was not taken."""
        with self._lock:
            self._closed = reason
            messages, self._messages = self._messages, []
        return messages
