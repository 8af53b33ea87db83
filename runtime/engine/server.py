"""The engine channel: one bidirectional gRPC stream of frames per front door, over one engine.

    front door --frames--> _read: submit, abort, status
               <--frames-- _write <-- queue <-- deliver (one StepFrame per step that has something for this stream)
                                        ^------ _report_load (its load, when it changed or a second has passed)

The server has a thread and a loop of its own, so that a step never waits for a socket. A stream that breaks, or does not read what it is
sent, ends, and every request that came over it is aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import logging
import math
import time
from array import array

import grpc
import grpc.aio

from runtime.engine import frames
from runtime.engine.engine import Engine
from runtime.engine.frames import Load, RequestOutput, StatusQuery, StatusReply, StepFrame
from runtime.engine.live import EngineRequest
from runtime.errors import MobulaError
from runtime.loop import LoopThread
from workers.step import SamplingSettings

log = logging.getLogger(__name__)

MAX_UNSENT_FRAMES = 4096
MAX_FRAME_BYTES = 256 << 20  # a longest prompt with its logprobs
LOAD_EVERY_S = 0.5  # while it changes
HEARTBEAT_EVERY_S = 1.0  # while it does not
START_TIMEOUT_S = 30.0
STOP_GRACE_S = 1.0

_Context = grpc.aio.ServicerContext[bytes, bytes]


class _Stream:
    """One front door. Belongs to the server's loop."""

    def __init__(self, number: int, hello: frames.Hello) -> None:
        self.number = number
        self.hello = hello  # as it was last told
        self.queue: asyncio.Queue[frames.Frame] = asyncio.Queue(MAX_UNSENT_FRAMES)
        self.overflowed = asyncio.Event()
        self.last_load: Load | None = None
        self.last_sent_s = 0.0
        self.put(hello)

    def put(self, frame: frames.Frame) -> None:
        try:
            self.queue.put_nowait(frame)
        except asyncio.QueueFull:
            self.overflowed.set()
            return
        if isinstance(frame, StepFrame | StatusReply):
            self.last_load, self.last_sent_s = frame.load, time.monotonic()


class EngineServer:
    """Construct it first and give its `deliver` to the engine as the sink; then `start(engine)`; `stop` ends all streams."""

    def __init__(self, *, secret: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self._secret, self._host, self._port = secret, host, port
        self._streams: dict[int, _Stream] = {}
        self._numbers = itertools.count(1)
        self._engine: Engine | None = None
        self._server: grpc.aio.Server | None = None
        self._reporter: asyncio.Task[None] | None = None
        self._thread = LoopThread("engine-channel")

    def start(self, engine: Engine) -> int:
        """Serves the engine's streams from now on; returns the port. RuntimeError when the address cannot be bound."""
        self._engine = engine
        return self._thread.run(self._start(), START_TIMEOUT_S)

    def stop(self) -> None:
        """Ends every stream; what was delivered before is sent first, within a grace period."""
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                self._thread.run(self._stop(), STOP_GRACE_S + 5.0)
        self._thread.close()

    def deliver(self, outputs: dict[int, list[RequestOutput]], load: Load) -> None:
        """The engine's sink: called on its thread, once per step."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: so have all streams
            self._thread.loop.call_soon_threadsafe(self._dispatch, outputs, load)

    # Below: on the loop's thread

    async def _start(self) -> int:
        options = [
            ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
            ("grpc.max_send_message_length", MAX_FRAME_BYTES),
            ("grpc.so_reuseport", 0),
        ]
        self._server = grpc.aio.server(options=options)
        service, method = frames.METHOD.lstrip("/").split("/")
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._channel)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        await self._server.start()
        self._reporter = asyncio.create_task(self._report_load())
        return port

    async def _stop(self) -> None:
        assert self._server is not None
        if self._reporter is not None:
            self._reporter.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE_S):
                await asyncio.gather(*(stream.queue.join() for stream in self._streams.values()))
        await self._server.stop(grace=0.1)

    def _dispatch(self, outputs: dict[int, list[RequestOutput]], load: Load) -> None:
        for number, batch in outputs.items():
            stream = self._streams.get(number)
            if stream is not None:
                stream.put(StepFrame(batch, load))

    async def _report_load(self) -> None:
        assert self._engine is not None
        while True:
            await asyncio.sleep(LOAD_EVERY_S)
            load, hello, now_s = self._engine.load, self._engine.hello(), time.monotonic()
            for stream in self._streams.values():
                if hello != stream.hello:  # it knows its weights now
                    stream.hello = hello
                    stream.put(hello)
                silent_s = now_s - stream.last_sent_s
                if silent_s >= (LOAD_EVERY_S / 2 if load != stream.last_load else HEARTBEAT_EVERY_S - LOAD_EVERY_S / 2):
                    stream.put(StepFrame([], load))

    async def _channel(self, _requests: object, context: _Context) -> None:
        """One stream's life, as a generic handler that reads and writes raw bytes."""
        assert self._engine is not None
        secret = next((value for key, value in context.invocation_metadata() or () if key == frames.SECRET_HEADER), "")
        if not hmac.compare_digest(str(secret).encode(), self._secret.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the engine channel needs the cluster's secret")
        stream = _Stream(next(self._numbers), self._engine.hello())
        self._streams[stream.number] = stream
        tasks = [
            asyncio.create_task(self._read(stream, context)),
            asyncio.create_task(self._write(stream, context)),
            asyncio.create_task(stream.overflowed.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            del self._streams[stream.number]
            self._engine.abort_stream(stream.number)
        if stream.overflowed.is_set():
            log.warning("front door %s does not read: %d frames wait; it is disconnected", context.peer(), MAX_UNSENT_FRAMES)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the front door does not read its outputs")
        if isinstance(results[0], ValueError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(results[0]))

    async def _read(self, stream: _Stream, context: _Context) -> None:
        """Until the front door ends or breaks the stream. ValueError for what is not a frame of its side."""
        assert self._engine is not None
        while isinstance(payload := await context.read(), bytes):
            frame = frames.decode(payload)
            if isinstance(frame, frames.Submit):
                self._submit(stream, frame)
            elif isinstance(frame, frames.Abort):
                self._engine.abort((stream.number, frame.request_id), frame.reason, frame.num_output_tokens)
            elif isinstance(frame, StatusQuery):
                stream.put(StatusReply(frame.query_id, self._engine.stats(), self._engine.load))
            else:
                raise ValueError(f"a front door does not send {type(frame).__name__}")

    async def _write(self, stream: _Stream, context: _Context) -> None:
        while True:
            await context.write(frames.encode(await stream.queue.get()))
            stream.queue.task_done()

    def _submit(self, stream: _Stream, submit: frames.Submit) -> None:
        """Hands a request to the engine; one that it refuses gets its answer at once."""
        assert self._engine is not None
        try:
            self._engine.submit(_engine_request(stream.number, submit))
        except MobulaError as error:
            refusal = RequestOutput(submit.request_id, [], error=[type(error).__name__, str(error)])
            stream.put(StepFrame([refusal], self._engine.load))


def _engine_request(stream: int, submit: frames.Submit) -> EngineRequest:
    """ValueError for what is not a request: columns that are not whole token ids, a time that is none."""
    prompt, output = array("I"), array("I")
    prompt.frombytes(submit.prompt)
    output.frombytes(submit.output)
    if submit.timeout_s is not None and not math.isfinite(submit.timeout_s):
        raise ValueError(f"timeout_s: must be a finite number of seconds, not {submit.timeout_s}")
    if not 0 <= submit.pin_ttl_s < math.inf:
        raise ValueError(f"pin_ttl_s: must be a finite number of seconds, at least 0, not {submit.pin_ttl_s}")
    return EngineRequest(
        stream=stream,
        request_id=submit.request_id,
        prompt=prompt,
        sampling=SamplingSettings(*submit.sampling),
        max_tokens=submit.max_tokens,
        end_token_ids=frozenset(submit.end_token_ids),
        tenant=submit.tenant,
        cache_salt=submit.cache_salt,
        deadline_s=None if submit.timeout_s is None else time.monotonic() + submit.timeout_s,
        output=output,
        pin_ttl_s=submit.pin_ttl_s,
    )
