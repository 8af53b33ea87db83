"""One front door: a gRPC server and the parts behind it. Started, told the membership, stopped."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cache_store.client import StoreClient
from protos import inference_pb2_grpc as rpc
from runtime.api_keys import Tenants
from runtime.errors import DeploymentError
from runtime.frontdoor.config import FrontDoorConfig
from runtime.frontdoor.interceptors import AuthInterceptor, ErrorInterceptor
from runtime.frontdoor.live import LiveRequests
from runtime.frontdoor.pins import PinKeeper
from runtime.frontdoor.pipeline import Pipeline
from runtime.frontdoor.service import SERVICE, InferenceService
from runtime.frontdoor.status import StatusReporter
from runtime.frontdoor.stores import StoreAccess, StoreClients
from runtime.frontdoor.validate import Validator
from runtime.metrics import FrontDoorMetrics, MetricsServer
from runtime.routing.engine_channel import ChannelSettings
from runtime.routing.policies import make_policy
from runtime.routing.router import Router
from runtime.routing.types import Membership, PolicySettings
from runtime.text.model_card import load_served_model

__all__ = ["FrontDoor", "FrontDoorConfig"]

_TOKENIZER_THREADS = 2
_HEALTH_PERIOD_S = 1.0  # how soon a replica's silence is seen; its coming and going is seen at once


class FrontDoor:
    """For one event loop: `start`, `set_membership` any number of times, `stop`."""

    def __init__(self, config: FrontDoorConfig) -> None:
        """Reads the model's folder: CheckpointError. DeploymentError for an unknown policy."""
        self._config = config
        model = load_served_model(config.model, max_model_len=config.max_model_len)
        self._executor = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._changed = asyncio.Event()
        policy = make_policy(config.policy, PolicySettings(config.affinity_limit_tokens))
        channels = ChannelSettings(secret=config.secret, silence_limit_s=config.silence_limit_s)
        self.router = Router(policy, channels, self._changed.set)
        self.metrics = FrontDoorMetrics(self.router.replica_figures)
        self._tenants = Tenants(config.api_keys, config.secret)
        self._stores = StoreClients(self.router, self._connect_store)
        self._status = StatusReporter(self.router, self._stores, config.status_timeout_s)
        self._live = LiveRequests(config.max_live_requests)
        validator = Validator(model, self._executor, self.router.max_model_len, config.model_names)
        pipeline = Pipeline(self.router, model.tokenizer, self.metrics)
        self._service = InferenceService(
            model,
            validator,
            pipeline,
            self._status,
            PinKeeper(self._stores),
            self._live,
            self._tenants,
            self.metrics,
            config.write_timeout_s,
        )
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._metrics_server: MetricsServer | None = None
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listens, and returns "host:port". DeploymentError when the address is taken."""
        interceptors = [AuthInterceptor(self._tenants, self.metrics.count_failure), ErrorInterceptor(SERVICE, self.metrics.count_failure)]
        server = grpc.aio.server(interceptors=interceptors, options=_server_options(self._config))
        rpc.add_InferenceServicer_to_server(self._service, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            port = server.add_insecure_port(f"{host}:{self._config.port}")
        except RuntimeError as error:
            raise DeploymentError(f"cannot listen on {host}:{self._config.port}: {error}; choose another --port or --host") from error
        self._start_metrics()
        await self._report_health()
        await server.start()
        self._server = server
        self._health_task = asyncio.create_task(self._watch_health(), name="front-door-health")
        return f"{host}:{port}"

    def _start_metrics(self) -> None:
        config = self._config
        if config.metrics_port is None:
            return
        try:
            self._metrics_server = MetricsServer(config.host, config.metrics_port, self.metrics.registry)
        except OSError as error:
            where = f"{config.host}:{config.metrics_port}"
            raise DeploymentError(f"cannot serve metrics on {where}: {error}; choose another --metrics-port") from error
        self._status.metrics_address = self._metrics_server.address

    async def set_membership(self, membership: Membership) -> None:
        await self.router.set_membership(membership)

    async def stop(self, grace_s: float) -> None:
        """Refuses new requests, lets running ones finish for up to `grace_s`, then ends them and everything else."""
        if self._health_task is not None:
            self._health_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._health_task
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace_s)
        await self.router.close()
        await self._stores.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _connect_store(self, address: str) -> StoreAccess:
        return StoreClient(address, self._config.secret, timeout_s=self._config.status_timeout_s)

    async def _report_health(self) -> None:
        serving = self.router.is_serving(self._config.healthy_for_s, self._config.healthy_step_s)
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def _watch_health(self) -> None:
        while True:
            self._changed.clear()
            await self._report_health()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_PERIOD_S):
                    await self._changed.wait()


def _server_options(config: FrontDoorConfig) -> list[tuple[str, Any]]:
    """A client whose machine vanished sends no end of stream: only a probe that it does not answer shows that nobody reads any more."""
    keepalive_ms = int(config.keepalive_s * 1000)
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not shared
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        ("grpc.http2.ping_timeout_ms", keepalive_ms),  # 60 s unless set, whatever the line before says
        ("grpc.http2.max_pings_without_data", 0),  # no bound: a request that waits sends nothing
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),  # clients may probe us as well
    ]
