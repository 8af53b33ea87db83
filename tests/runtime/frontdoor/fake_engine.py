"""An engine without a model: speaks frames over real gRPC and produces the outputs it was told, one per request and step.

`python -m tests.runtime.frontdoor.fake_engine` runs one in a process of its own, prints its port and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio

from runtime.engine import frames
from runtime.engine.frames import Abort, EngineStats, Hello, Load, RequestOutput, StatusQuery, StatusReply, StepFrame, Submit

Plan = Callable[[Submit], list[RequestOutput]]


def tokens_plan(token_ids: list[int] | None = None, cached: tuple[int, int, int, int] = (0, 0, 0, 0), tokens_per_step: int = 1) -> Plan:
    """Produces `token_ids` over and over (default: 1), up to max_tokens or an end token, as an engine would: without those that a request
    brings along."""

    def plan(submit: Submit) -> list[RequestOutput]:
        source = token_ids or [1]
        produced = []
        reason = "length"
        for index in range(len(submit.output) // 4, submit.max_tokens):
            produced.append(source[index % len(source)])
            if produced[-1] in submit.end_token_ids:
                reason = "stop"
                break
        steps = [produced[start : start + tokens_per_step] for start in range(0, len(produced), tokens_per_step)]
        outputs = [RequestOutput(submit.request_id, tokens) for tokens in steps]
        num_computed = len(submit.prompt) // 4 - sum(cached)
        outputs[0] = outputs[0]._replace(cached=list(cached), receipt=[num_computed, 4096, {"cold": num_computed}])
        outputs[-1] = outputs[-1]._replace(finish_reason=reason, timings=[0.25, 0.125])
        return outputs

    return plan


class FakeEngine:
    def __init__(self, replica_id: str = "r0", plan: Plan | None = None, *, secret: str = "", step_s: float = 0.0, **hello: Any) -> None:
        self.plan = plan or tokens_plan()
        self.hello = Hello(replica_id, f"{replica_id}-first", b"w" * 16, b"r" * 16, 16, 512, 100_000)._replace(**hello)
        self.secret = secret
        self.step_s = step_s
        self.submitted: list[Submit] = []
        self.aborted: list[Abort] = []
        self.num_streams = 0
        self.load = Load(0, 0, 0)
        self.running = asyncio.Event()  # clear it to hold the steps
        self.running.set()
        self.news: list[Hello] = []  # sent with the next answer to a status query
        self.answers_status = True
        self.step_age_s = 0.5
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> str:
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
        _, service, method = frames.METHOD.split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._channel)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def _channel(self, requests: Any, context: Any) -> None:
        if dict(context.invocation_metadata()).get(frames.SECRET_HEADER) != self.secret:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong secret")
        await context.write(frames.encode(self.hello))
        self.num_streams += 1
        live: dict[str, Iterator[RequestOutput]] = {}
        replies: deque[StatusReply] = deque()
        wake = asyncio.Event()
        reader = asyncio.create_task(self._read(requests, live, replies, wake))
        try:
            while not reader.done():
                wake.clear()
                while replies and self.news:
                    await context.write(frames.encode(self.news.pop()))
                while replies:
                    await context.write(frames.encode(replies.popleft()))
                if live and self.running.is_set():
                    await context.write(frames.encode(self._step(live)))
                    if live:
                        await asyncio.sleep(self.step_s)
                else:
                    waits = [asyncio.create_task(wake.wait()), asyncio.create_task(self.running.wait() if live else wake.wait())]
                    try:
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for wait in waits:
                            wait.cancel()
        finally:
            reader.cancel()

    def _step(self, live: dict[str, Iterator[RequestOutput]]) -> StepFrame:
        outputs = []
        for request_id, source in list(live.items()):
            outputs.append(next(source))
            if outputs[-1].finish_reason or outputs[-1].error:
                del live[request_id]
        return StepFrame(outputs, self.load)

    async def _read(self, requests: Any, live: dict[str, Any], replies: deque[StatusReply], wake: asyncio.Event) -> None:
        async for payload in requests:
            frame = frames.decode(payload)
            if isinstance(frame, Submit):
                self.submitted.append(frame)
                live[frame.request_id] = iter(self.plan(frame))
            elif isinstance(frame, Abort):
                self.aborted.append(frame)
                live.pop(frame.request_id, None)
            elif isinstance(frame, StatusQuery) and self.answers_status:
                stats = EngineStats(len(live), 3, 100, 40, 20, 5, 6, 7, 8, self.step_age_s, "ready")
                replies.append(StatusReply(frame.query_id, stats, self.load))
            wake.set()
        wake.set()


async def eventually(condition: Callable[[], Any], timeout_s: float = 5.0) -> Any:
    """Polls until `condition` is true, and returns what it returned."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while not (value := condition()):
        assert asyncio.get_running_loop().time() < deadline_s, "it never came true"
        await asyncio.sleep(0.002)
    return value


async def _serve() -> None:
    engine = FakeEngine(plan=tokens_plan([int(token) for token in sys.argv[1].split(",")]), step_s=float(sys.argv[2]))
    await engine.start()
    print(engine.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(_serve())
