"""The outputs of one request, between the stream of its engine and its reader. For one event loop."""

from __future__ import annotations

import asyncio
from collections import deque

from cache_store.errors import MobulaError
from runtime.engine.frames import RequestOutput
from runtime.errors import Overloaded

MAX_UNREAD = 1 << 16  # tokens and logprobs of one request that wait for its reader
MAX_JOINED_TOKENS = 256
_TOKENS_ONLY = (None,) * (len(RequestOutput._fields) - 2)


class Turnstile:
    """Lets a few readers through in one turn of the event loop, first come first served, but those without a token before all others.

    Sending an event costs a loop many times more than receiving a token. Without this a loop that falls behind would send every token of a
    step before it looks for the next step, never have two tokens to send together, and hold the engine's stream up. Nothing is held while
    an event is being sent, so a reader that does not read is in nobody's way.

    While somebody has no token yet the turns are short: what is done for a new request before its engine hears of it takes some ten turns.
    """

    def __init__(self, max_per_turn: int = 4, max_beside_new: int = 2) -> None:
        self.num_new = 0  # readers that have no token yet, whether they wait here or not
        self._max_per_turn, self._max_beside_new = max_per_turn, max_beside_new
        self._num_through = 0  # in this turn
        self._is_turning = False
        self._new: deque[asyncio.Future[None]] = deque()
        self._others: deque[asyncio.Future[None]] = deque()

    @property
    def _is_open(self) -> bool:
        return self._num_through < (self._max_beside_new if self.num_new else self._max_per_turn)

    async def enter(self, *, is_new: bool = False) -> None:
        """`is_new`: the reader is one of `num_new`."""
        loop = asyncio.get_running_loop()
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._turn)
        waiting = self._new if is_new else self._others
        if self._is_open and not (self._new or waiting):
            self._num_through += 1
            return
        place = loop.create_future()
        waiting.append(place)
        await place

    def _turn(self) -> None:
        self._num_through = 0
        while self._is_open and (waiting := self._new or self._others):
            place = waiting.popleft()
            if not place.done():  # else its reader was cancelled
                place.set_result(None)
                self._num_through += 1
        self._is_turning = self._num_through > 0
        if self._is_turning:
            asyncio.get_running_loop().call_soon(self._turn)


class OutputQueue:
    """Never makes the other requests of a stream wait: a slow reader finds several outputs at once.

    Bounded twice. An engine that sends more than `max_tokens` is broken, and the request fails. A reader that lets more than `max_unread`
    tokens and logprobs gather fails with Overloaded, and what gathered is dropped: nobody's memory is a slow client's buffer.
    """

    __slots__ = ("_error", "_has_last", "_max_tokens", "_max_unread", "_num_tokens", "_num_unread", "_outputs", "_waiter")

    def __init__(self, max_tokens: int, max_unread: int = MAX_UNREAD) -> None:
        self._max_tokens = max_tokens
        self._max_unread = max_unread
        self._num_tokens = 0
        self._num_unread = 0
        self._outputs: list[RequestOutput] = []
        self._has_last = False
        self._error: MobulaError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_unread(self) -> int:
        """Tokens and logprobs that wait for the reader."""
        return self._num_unread

    def put(self, output: RequestOutput) -> bool:
        """An output with a finish reason or an error is the last; later ones are dropped. False once the request has failed here."""
        if self._error is not None:
            return False
        if self._has_last:
            return True
        self._has_last = output.finish_reason is not None or output.error is not None
        self._num_tokens += len(output.token_ids)
        self._num_unread += len(output.token_ids) + _num_scores(output.logprobs) + _num_scores(output.prompt_logprobs)
        if self._num_tokens > self._max_tokens:
            self.fail(MobulaError(f"the engine sent {self._num_tokens} tokens for a request of at most {self._max_tokens}"))
        elif self._num_unread > self._max_unread:
            self.fail(
                Overloaded(f"the client reads too slowly: {self._num_unread} tokens and logprobs wait for it; read faster or ask for less")
            )
            self._outputs.clear()
            self._num_unread = 0
        else:
            self._append(output)
            self._wake()
        return self._error is None

    def _append(self, output: RequestOutput) -> None:
        """Tokens alone are joined to those that wait already: 40 bytes each where an output of its own takes 300."""
        last = self._outputs[-1] if self._outputs else None
        if (
            last is not None
            and len(last.token_ids) < MAX_JOINED_TOKENS
            and last.logprobs is None
            and last.prompt_logprobs is None
            and output[2:] == _TOKENS_ONLY
        ):
            last.token_ids.extend(output.token_ids)
        else:
            self._outputs.append(output)

    def fail(self, error: MobulaError) -> None:
        """Ends the queue: what is in it is still read, then `error` is raised. Only the first error counts."""
        if self._error is None:
            self._error = error
            self._wake()

    async def take(self, turnstile: Turnstile, *, is_new: bool = False) -> list[RequestOutput]:
        """Everything that is there, at least one output. The engine channel fails the queue when the engine falls silent, so this ends.
        `is_new`: see Turnstile.enter."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        await turnstile.enter(is_new=is_new)
        if not self._outputs:
            return await self.take(turnstile, is_new=is_new)  # it failed at the turnstile, which drops what was there
        outputs, self._outputs, self._num_unread = self._outputs, [], 0
        return outputs

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _num_scores(logprobs: list[list[tuple[int, float]]] | bytes | None) -> int:
    if logprobs is None:
        return 0
    return len(logprobs) // 4 if isinstance(logprobs, bytes) else sum(map(len, logprobs))
