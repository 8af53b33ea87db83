"""Writes to clients, each within a limit. One timer looks after all of them: one for each would cost a tenth of what a token costs."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from runtime.errors import Overloaded

LOOKS_PER_LIMIT = 4


class Writes:
    """For one event loop. A write ends late by no more than a part of the limit."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._begun_s: dict[asyncio.Task[Any], float] = {}  # in order
        self._overdue: set[asyncio.Task[Any]] = set()  # cancelled here
        self._is_watching = False

    async def write(self, context: grpc.aio.ServicerContext[Any, Any], message: object) -> None:
        """Waits while the client's window is full. Overloaded when it stays so: a client may be slow, but not keep its place for ever."""
        task = asyncio.current_task()
        assert task
        loop = task.get_loop()
        self._begun_s[task] = loop.time()
        if not self._is_watching:
            self._is_watching = True
            loop.call_later(self._limit_s / LOOKS_PER_LIMIT, self._look, loop)
        try:
            await context.write(message)
        except asyncio.CancelledError:
            if task in self._overdue and not task.uncancel():  # else somebody else has cancelled it as well
                raise Overloaded(f"the client has taken nothing from its stream for {self._limit_s:g} s") from None
            raise
        finally:
            del self._begun_s[task]
            self._overdue.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        latest_s = loop.time() - self._limit_s
        for task, begun_s in self._begun_s.items():
            if begun_s > latest_s:
                break
            if task not in self._overdue:
                self._overdue.add(task)
                task.cancel()
        self._is_watching = bool(self._begun_s)
        if self._is_watching:
            loop.call_later(self._limit_s / LOOKS_PER_LIMIT, self._look, loop)
