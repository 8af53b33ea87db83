"""The front door's end of the engine channel: one long-lived stream per engine, shared by all requests that run there.

    connecting --Hello--> connected --broken, silent or not a frame--> waiting (backoff with jitter) --> connecting

While connected, `hello` is set and requests may be opened. When the stream ends, for whatever reason, every request on it fails with
ReplicaLost before anything else happens. An engine that sends nothing for `silence_limit_s`, though asked every `heartbeat_s`, is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import grpc
import grpc.aio

from runtime.engine import frames
from runtime.engine.frames import Abort, EngineStats, Frame, Hello, Load, StatusQuery, StatusReply, StepFrame, Submit
from runtime.errors import Overloaded, ReplicaLost
from runtime.routing.output_queue import MAX_UNREAD, OutputQueue

log = logging.getLogger(__name__)

_IDLE = Load(0, 0, 0)
_HEARTBEAT = 0  # the query id whose reply nobody waits for


class ChannelSettings(NamedTuple):
    secret: str = ""
    hello_timeout_s: float = 5.0
    heartbeat_s: float = 2.0
    silence_limit_s: float = 15.0
    min_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    max_unsent_frames: int = 4096
    max_frame_bytes: int = 256 << 20  # a longest prompt with its logprobs


class EngineChannel:
    """For one event loop. `start`, then `close`; `on_change` is called when the engine comes or goes."""

    def __init__(self, replica_id: str, address: str, settings: ChannelSettings, on_change: Callable[[], None]) -> None:
        self.replica_id = replica_id
        self.address = address
        self.hello: Hello | None = None  # set while connected
        self.load = _IDLE
        self.stats: EngineStats | None = None  # as of the last answer to a query; None while not connected
        self.last_answer_s = 0.0  # event loop time of the last frame
        self.step_age_s = 0.0  # of the step the ranks had not finished when the engine was last asked
        self.problem = "not connected yet"
        self._settings = settings
        self._on_change = on_change
        self._queues: dict[str, OutputQueue] = {}
        self._queries: dict[int, asyncio.Future[StatusReply]] = {}
        self._query_ids = itertools.count(_HEARTBEAT + 1)
        self._unsent: deque[Frame] = deque()
        self._unsent_added = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_live(self) -> int:
        return len(self._queues)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"engine-channel-{self.replica_id}")

    async def close(self) -> None:
        """Breaks the stream; requests still on it fail with ReplicaLost."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def open(self, submit: Submit, max_unread: int = MAX_UNREAD) -> OutputQueue:
        """Sends a request. ReplicaLost when the engine is not connected, Overloaded when it does not read."""
        if self.hello is None:
            raise ReplicaLost(self._lost_message())
        if len(self._unsent) >= self._settings.max_unsent_frames:
            raise Overloaded(f"replica {self.replica_id} does not read its requests; try again later")
        queue = self._queues[submit.request_id] = OutputQueue(submit.max_tokens, max_unread)
        self._send(submit)
        return queue

    def abort(self, request_id: str, reason: str, num_output_tokens: int = 0) -> None:
        """Ends a request; nothing happens when it has ended. Its queue gets nothing more."""
        if self._queues.pop(request_id, None) is not None:
            self._send(Abort(request_id, reason, num_output_tokens))

    async def status(self, timeout_s: float) -> StatusReply:
        """TimeoutError when the engine does not answer in time, ReplicaLost when it is not connected."""
        if self.hello is None:
            raise ReplicaLost(self._lost_message())
        query_id = next(self._query_ids)
        reply = self._queries[query_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(StatusQuery(query_id))
            return await asyncio.wait_for(reply, timeout_s)
        finally:
            del self._queries[query_id]

    def _send(self, frame: Frame) -> None:
        self._unsent.append(frame)
        self._unsent_added.set()

    def _lost_message(self) -> str:
        return f"replica {self.replica_id} at {self.address} is lost: {self.problem}"

    async def _run(self) -> None:
        settings = self._settings
        backoff_s = settings.min_backoff_s
        try:
            while True:
                try:
                    await self._session()
                except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError, ValueError) as error:
                    self.problem = _reason(error)
                if self.hello is not None:
                    backoff_s = settings.min_backoff_s
                    log.warning("%s", self._lost_message())
                self._disconnect()
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, settings.max_backoff_s)
        finally:
            self.problem = "the channel was closed"
            self._disconnect()

    def _disconnect(self) -> None:
        was_connected, self.hello, self.load, self.step_age_s = self.hello is not None, None, _IDLE, 0.0
        self.stats = None
        self._unsent.clear()
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            queue.fail(ReplicaLost(self._lost_message()))
        for reply in self._queries.values():
            if not reply.done():
                reply.set_exception(ReplicaLost(self._lost_message()))
        if was_connected:
            self._on_change()

    async def _session(self) -> None:
        """One stream, from the connection until it breaks: always ends by raising."""
        settings = self._settings
        options = [
            ("grpc.use_local_subchannel_pool", 1),  # a new channel starts without the last one's backoff
            ("grpc.max_receive_message_length", settings.max_frame_bytes),
            ("grpc.max_send_message_length", settings.max_frame_bytes),
        ]
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            stream: Stream = channel.stream_stream(frames.METHOD)(metadata=((frames.SECRET_HEADER, settings.secret),))
            async with asyncio.timeout(settings.hello_timeout_s):
                hello = frames.decode(await _read(stream))
            if not isinstance(hello, Hello):
                raise ValueError(f"the engine's first frame must be Hello, not {type(hello).__name__}")
            self.hello, self.problem = hello, ""
            self.last_answer_s = asyncio.get_running_loop().time()
            self._on_change()
            loops = [asyncio.create_task(self._read_loop(stream)), asyncio.create_task(self._write_loop(stream))]
            try:
                await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for loop in loops:
                    loop.cancel()
                results = await asyncio.gather(*loops, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                    raise result
            raise ValueError("the stream was cancelled")

    async def _read_loop(self, stream: Stream) -> None:
        clock = asyncio.get_running_loop().time
        limit_s = self._settings.silence_limit_s
        async with asyncio.timeout(limit_s) as silence:
            while True:
                frame = frames.decode(await _read(stream))
                self.last_answer_s = now_s = clock()
                silence.reschedule(now_s + limit_s)
                if isinstance(frame, StepFrame):
                    self._deliver(frame)
                elif isinstance(frame, StatusReply):
                    self.load, self.stats, self.step_age_s = frame.load, frame.stats, frame.stats.step_age_s
                    reply = self._queries.get(frame.query_id)
                    if reply is not None and not reply.done():
                        reply.set_result(frame)
                elif isinstance(frame, Hello):
                    self.hello = frame
                else:
                    raise ValueError(f"the engine sent a {type(frame).__name__}")

    def _deliver(self, frame: StepFrame) -> None:
        """Outputs of requests that ended here meanwhile are dropped."""
        self.load = frame.load
        queues = self._queues
        for output in frame.outputs:
            queue = queues.get(output.request_id)
            if queue is not None:
                if output.finish_reason is not None or output.error is not None:
                    del queues[output.request_id]
                if not queue.put(output):
                    self.abort(output.request_id, "abort")

    async def _write_loop(self, stream: Stream) -> None:
        clock = asyncio.get_running_loop().time
        next_heartbeat_s = clock() + self._settings.heartbeat_s
        while True:
            while self._unsent:
                await stream.write(frames.encode(self._unsent.popleft()))
            self._unsent_added.clear()
            try:
                async with asyncio.timeout_at(next_heartbeat_s):
                    await self._unsent_added.wait()
            except TimeoutError:
                next_heartbeat_s = clock() + self._settings.heartbeat_s
                self._send(StatusQuery(_HEARTBEAT))


Stream = grpc.aio.StreamStreamCall[bytes, bytes]


async def _read(stream: Stream) -> bytes:
    payload = await stream.read()
    if not isinstance(payload, bytes):
        raise ValueError("the engine ended the stream")
    return payload


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return "no answer in time" if isinstance(error, TimeoutError) else str(error)
