"""The front door's inside without its gRPC server: one process that validates, routes and detokenises for itself."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from protos import inference_pb2 as pb
from runtime.frontdoor.config import FrontDoorConfig
from runtime.frontdoor.messages import event_message
from runtime.frontdoor.pipeline import Pipeline
from runtime.frontdoor.validate import Validator
from runtime.metrics import FrontDoorMetrics
from runtime.routing.engine_channel import ChannelSettings
from runtime.routing.policies import make_policy
from runtime.routing.router import Router
from runtime.routing.types import Membership, PolicySettings
from runtime.text.model_card import load_served_model

CONNECT_TIMEOUT_S = 30.0


class OfflineDoor:
    """with-able by `async with`, within one event loop."""

    def __init__(self, config: FrontDoorConfig, membership: Membership) -> None:
        """Reads the model's folder: CheckpointError."""
        model = load_served_model(config.model, max_model_len=config.max_model_len)
        metrics = FrontDoorMetrics()
        self._membership = membership
        self._changed = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        policy = make_policy(config.policy, PolicySettings(config.affinity_limit_tokens))
        self._router = Router(policy, ChannelSettings(secret=config.secret, silence_limit_s=config.silence_limit_s), self._changed.set)
        self._validator = Validator(model, self._executor, self._router.max_model_len, config.model_names)
        self._pipeline = Pipeline(self._router, model.tokenizer, metrics)

    async def __aenter__(self) -> OfflineDoor:
        await self._router.set_membership(self._membership)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while not self._router.has_ready(set()):
                await self._changed.wait()
                self._changed.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._router.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateEvent, None]:
        """The events that the service would stream, or one of runtime.errors."""
        request_id = request.request_id or uuid.uuid4().hex
        valid = await self._validator.validate(request, request_id, tenant="", deadline_s=None)
        async with contextlib.aclosing(self._pipeline.generate(valid)) as events:
            async for event in events:
                yield event_message(event)
