"""`mobula generate`: one request, against an address or offline through Ray, streamed as text or printed as one JSON line."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

from rich.console import Console

from protos import inference_pb2 as pb
from runtime.client import Completion, InferenceClient, collect
from runtime.commands.models import announce_model
from runtime.commands.progress import LoadProgress
from runtime.config import EMBEDDED_MODELS, ServeSettings
from runtime.controller.deployment import deployed
from runtime.frontdoor.config import FrontDoorConfig
from runtime.frontdoor.offline import OfflineDoor

READY_TIMEOUT_S = 1800.0


def generate_remote(address: str, request: pb.GenerateRequest, *, as_json: bool, api_key: str = "") -> None:
    with InferenceClient(address, api_key=api_key) as client:
        _print(client.stream(request), sys.stdout, as_json=as_json)


def generate_offline(settings: ServeSettings, request: pb.GenerateRequest, *, as_json: bool, console: Console) -> None:
    """Starts a deployment without a front door, runs the request on it and removes it. No model: the embedded `gqa`.

    Standard output is the answer's alone: Ray, which tells there of workers that ended, is sent to standard error.
    """
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        _generate_offline(settings, request, out, as_json=as_json, console=console)


def _generate_offline(settings: ServeSettings, request: pb.GenerateRequest, out: TextIO, *, as_json: bool, console: Console) -> None:
    settings = replace(settings, model=settings.model or str(EMBEDDED_MODELS / "gqa"))
    announce_model(settings, console)
    with deployed(settings, front_doors=False) as deployment:
        with LoadProgress(console) as progress:
            deployment.wait_ready(READY_TIMEOUT_S, progress.show)
        config = FrontDoorConfig(
            model=settings.model, model_names=settings.model_names, policy=settings.policy, secret=deployment.spec.secret
        )
        with _offline_events(OfflineDoor(config, deployment.membership()), request) as events:
            _print(events, out, as_json=as_json)


@contextlib.contextmanager
def _offline_events(door: OfflineDoor, request: pb.GenerateRequest) -> Iterator[Iterator[pb.GenerateEvent]]:
    """The door's stream, read step by step from synchronous code on a loop of its own."""
    with asyncio.Runner() as runner:
        runner.run(door.__aenter__())
        stream = door.generate(request)

        async def following() -> pb.GenerateEvent | None:
            return await anext(stream, None)

        def pull() -> Iterator[pb.GenerateEvent]:
            while (event := runner.run(following())) is not None:
                yield event

        try:
            yield pull()
        finally:
            runner.run(stream.aclose())
            runner.run(door.__aexit__())


def _print(events: Iterator[pb.GenerateEvent], out: TextIO, *, as_json: bool) -> None:
    completion: Completion = collect(events if as_json else _echo(events, out))
    print(completion.to_json() if as_json else "", file=out, flush=True)


def _echo(events: Iterator[pb.GenerateEvent], out: TextIO) -> Iterator[pb.GenerateEvent]:
    """Writes text as it comes; ids where the model has no tokenizer."""
    wrote_text = False
    for event in events:
        if event.WhichOneof("event") == "tokens":
            wrote_text = wrote_text or bool(event.tokens.text)
            ids = "" if wrote_text else " ".join(str(token_id) for token_id in event.tokens.token_ids) + " "
            out.write(event.tokens.text or ids)
            out.flush()
        yield event
