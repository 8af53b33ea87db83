"""Both ends of the stream that a client's calls share. A call by itself costs twice as much: its headers, its deadline, its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from cache_store.errors import StoreUnavailable
from protos import cache_store_pb2 as pb

MAX_OPEN_CALLS = 1024  # of one stream, without an answer yet; then no more are read

Context = grpc.aio.ServicerContext[Any, Any]


async def serve_calls(answer: Callable[[pb.Call], Awaitable[pb.Answer]], context: Context) -> None:
    """One stream's life, until the client ends it. `answer` raises nothing that is the call's own fault."""
    room, writing = asyncio.Semaphore(MAX_OPEN_CALLS), asyncio.Lock()

    async def take(call: pb.Call) -> None:
        try:
            message = await answer(call)
            async with writing:
                await context.write(message)
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        while True:
            await room.acquire()
            call = await context.read()
            if not isinstance(call, pb.Call):
                return
            tasks.create_task(take(call))


class CallStream:
    """The client's end, for one loop. The stream is opened by the first call, and again by the next one after it has broken."""

    def __init__(self, open_call: Callable[[], grpc.aio.StreamStreamCall[pb.Call, pb.Answer]]) -> None:
        self._open_call = open_call
        self._stream: _Stream | None = None
        self._numbers = itertools.count(1)
        self._is_closed = False

    async def ask(self, kind: str, request: Any) -> pb.Answer:
        """`kind`: the field of Call that `request` goes into. AioRpcError or StoreUnavailable when the stream breaks, UsageError after
        `close`. The caller sets the deadline."""
        if self._is_closed:
            raise grpc.aio.UsageError("the stream of calls is closed")
        if self._stream is None or self._stream.has_ended:
            self._stream = _Stream(self._open_call())
        return await self._stream.ask(pb.Call(number=next(self._numbers), **{kind: request}))

    async def close(self) -> None:
        """Calls without an answer raise StoreUnavailable."""
        self._is_closed = True
        if self._stream is not None:
            await self._stream.close()


class _Stream:
    """One stream, from when it is opened until it breaks. Calls are written by a task of its own: who gives one up in the middle of a write
    would break the stream for all."""

    def __init__(self, call: grpc.aio.StreamStreamCall[pb.Call, pb.Answer]) -> None:
        self.has_ended = False
        self._call = call
        self._answers: dict[int, asyncio.Future[pb.Answer]] = {}
        self._unsent: asyncio.Queue[pb.Call] = asyncio.Queue()  # no longer than the callers' open calls
        self._reader = asyncio.create_task(self._read(), name="store-answers")

    async def ask(self, call: pb.Call) -> pb.Answer:
        future = self._answers[call.number] = asyncio.get_running_loop().create_future()
        self._unsent.put_nowait(call)
        try:
            answer: pb.Answer = await future
            return answer
        finally:
            self._answers.pop(call.number, None)

    async def _read(self) -> None:
        error: Exception = StoreUnavailable("the store has ended the stream of calls")
        writer = asyncio.create_task(self._write(), name="store-calls")
        try:
            while isinstance(answer := await self._call.read(), pb.Answer):
                future = self._answers.get(answer.number)
                if future is not None and not future.done():
                    future.set_result(answer)
        except grpc.aio.AioRpcError as reason:
            error = reason
        finally:
            self.has_ended = True
            writer.cancel()
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(error)

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader knows why the stream has ended
            while True:
                await self._call.write(await self._unsent.get())

    async def close(self) -> None:
        self._call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
