"""The inference service: each method validates, asks the pipeline or a replica, and answers. Errors are the interceptor's."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import grpc.aio

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from runtime.api_keys import Tenants
from runtime.errors import BadRequest, DeadlinePassed, status_of
from runtime.frontdoor.live import LiveRequests
from runtime.frontdoor.messages import event_message
from runtime.frontdoor.pins import PinKeeper
from runtime.frontdoor.pipeline import AbortSwitch, Finished, Pipeline
from runtime.frontdoor.record import RequestRecord
from runtime.frontdoor.status import StatusReporter
from runtime.frontdoor.validate import MAX_ID_CHARS, Validator, check_request_id
from runtime.frontdoor.writes import Writes
from runtime.metrics import FrontDoorMetrics
from runtime.text.model_card import ServedModel

SERVICE = "mobula.inference.v1.Inference"

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(rpc.InferenceServicer):
    def __init__(
        self,
        model: ServedModel,
        validator: Validator,
        pipeline: Pipeline,
        status: StatusReporter,
        pins: PinKeeper,
        live: LiveRequests,
        tenants: Tenants,
        metrics: FrontDoorMetrics,
        write_timeout_s: float,
    ) -> None:
        self._model = model
        self._validator = validator
        self._pipeline = pipeline
        self._status = status
        self._pins = pins
        self._live = live
        self._tenants = tenants
        self._writes = Writes(write_timeout_s)
        self._metrics = metrics

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        record = RequestRecord(request.request_id[:MAX_ID_CHARS], self._tenant(context))
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else record.arrived_s + remaining_s
        outcome = "cancelled"
        self._metrics.live_requests.inc()
        try:
            record.request_id = check_request_id(request.request_id)
            with self._live.admit(record.tenant, record.request_id) as switch:
                outcome = await self._generate(request, record, deadline_s, context, switch)
        except asyncio.CancelledError:
            if deadline_s is not None and time.monotonic() >= deadline_s:  # gRPC cancels a call that is past its deadline
                outcome = status_of(DeadlinePassed())[1]
            raise
        except Exception as error:
            outcome = status_of(error)[1]
            raise
        finally:
            self._metrics.live_requests.dec()
            self._metrics.requests.labels(outcome).inc()
            record.log_end(outcome)

    async def _generate(
        self, request: pb.GenerateRequest, record: RequestRecord, deadline_s: float | None, context: Context, switch: AbortSwitch
    ) -> str:
        """Returns the finish reason."""
        valid = await self._validator.validate(request, record.request_id, tenant=record.tenant, deadline_s=deadline_s)
        outcome = "cancelled"
        async with contextlib.aclosing(self._pipeline.generate(valid, record, switch)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    outcome = event.reason.value
                await self._writes.write(context, event_message(event))
        return outcome

    def _tenant(self, context: Context) -> str:
        return self._tenants.tenant_of(context.invocation_metadata())

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        if not request.request_id:
            raise BadRequest("request_id: must not be empty")
        found = self._live.abort(self._tenant(context), request.request_id)
        return pb.AbortResponse(outcome=pb.ABORTED if found else pb.UNKNOWN_REQUEST)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        card = self._model.card
        cards = [
            pb.ModelCard(
                name=name,
                architecture=card.architecture,
                max_model_len=self._validator.max_model_len,
                vocab_size=card.vocab_size,
                takes_text=self._model.tokenizer is not None,
                takes_chat=self._model.chat is not None,
            )
            for name in self._validator.model_names
        ]
        return pb.ListModelsResponse(models=cards)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        with self._live.visit():
            return pb.TokenizeResponse(token_ids=await self._validator.tokenize(request))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        with self._live.visit():
            return pb.DetokenizeResponse(text=await self._validator.detokenize(request))

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        return await self._status.report(len(self._live))

    async def ListPins(self, request: pb.ListPinsRequest, context: Context) -> pb.ListPinsResponse:  # noqa: N802
        return await self._pins.list(self._tenant(context))

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:  # noqa: N802
        return await self._pins.unpin(self._tenant(context), request)
