"""The figures of one front door, in a registry of its own that is passed down. Named as vLLM's where they mean the same.

What the front door sees itself is counted as it happens. What its replicas say of themselves, with every answer to a heartbeat, is read
when somebody asks: with several front doors each shows it, so those figures are to be joined by `replica`, the others added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.engine.frames import EngineStats, Load

_TTFT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40, 80)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_QUEUE_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, *_REQUEST_BUCKETS_S[1:])
_TOKEN_BUCKETS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))


class ReplicaFigures(NamedTuple):
    """What one replica last said of itself."""

    replica_id: str
    load: Load
    stats: EngineStats


class FrontDoorMetrics:
    """Written by the front door alone."""

    def __init__(self, replicas: Callable[[], Iterable[ReplicaFigures]] = lambda: ()) -> None:
        """`replicas` may be called from any thread."""
        self.registry = registry = CollectorRegistry()
        registry.register(_ReplicaCollector(replicas))
        self.requests = Counter(
            "mobula:requests",
            "Generate calls by how they ended: stop, length, abort, cancelled, or an error's label",
            ["status"],
            registry=registry,
        )
        self.successes = Counter("mobula:request_success", "Requests that ran to a finish", ["finished_reason"], registry=registry)
        self.resumes = Counter(
            "mobula:request_resumes", "Requests that went on at another replica after theirs had died", registry=registry
        )
        self.failures = Counter(
            "mobula:rpc_failures", "Calls of any method that ended in an error", ["method", "reason"], registry=registry
        )
        self.live_requests = Gauge("mobula:num_requests_live", "Generate calls that have not ended", registry=registry)
        self.prompt_tokens = Counter("mobula:prompt_tokens", "Prompt tokens of admitted requests", registry=registry)
        self.generation_tokens = Counter("mobula:generation_tokens", "Output tokens sent to clients", registry=registry)
        self.cache_queries = Counter("mobula:prefix_cache_queries", "Prompt tokens that were looked up", registry=registry)
        self.cache_hits = Counter("mobula:prefix_cache_hits", "Prompt tokens that were not computed", registry=registry)
        self.cached_tokens = Counter(
            "mobula:prompt_tokens_cached", "Prompt tokens that were not computed, by tier", ["tier"], registry=registry
        )
        self.not_reused_tokens = Counter(
            "mobula:prompt_tokens_not_reused",
            "Prompt tokens that were computed, by why they were not reused",
            ["reason"],
            registry=registry,
        )
        self.ttft_s = _histogram(registry, "time_to_first_token_seconds", "Arrival to first token", _TTFT_BUCKETS_S)
        self.inter_token_s = _histogram(
            registry, "inter_token_latency_seconds", "Time between events of one request, per token they carry", _INTER_TOKEN_BUCKETS_S
        )
        self.request_s = _histogram(registry, "e2e_request_latency_seconds", "Arrival to the last event", _REQUEST_BUCKETS_S)
        self.queue_s = _histogram(
            registry, "request_queue_time_seconds", "Arrival at the engine to first admission, without the store", _QUEUE_BUCKETS_S
        )
        self.store_wait_s = _histogram(registry, "request_store_wait_seconds", "Waited for the cache store", _QUEUE_BUCKETS_S)
        self.request_prompt_tokens = _histogram(registry, "request_prompt_tokens", "Prompt tokens of a request", _TOKEN_BUCKETS)
        self.request_output_tokens = _histogram(registry, "request_generation_tokens", "Output tokens of a request", _TOKEN_BUCKETS)

    def count_failure(self, method: str, reason: str) -> None:
        self.failures.labels(method, reason).inc()

    def render(self) -> bytes:
        """The text format that a Prometheus server reads."""
        return generate_latest(self.registry)


def _histogram(registry: CollectorRegistry, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"mobula:{name}", help_text, buckets=buckets, registry=registry)


class _ReplicaCollector(Collector):
    """Turns what the replicas last said into gauges, and the engine's own counts into counters."""

    def __init__(self, replicas: Callable[[], Iterable[ReplicaFigures]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        gauges = {name: GaugeMetricFamily(f"mobula:{name}", text, labels=["replica"]) for name, text in _GAUGES.items()}
        preemptions = CounterMetricFamily("mobula:num_preemptions", "Requests put back in the queue for lack of pages", labels=["replica"])
        steps = CounterMetricFamily("mobula:engine_steps", "Steps that the ranks have finished", labels=["replica"])
        for replica_id, load, stats in self._replicas():
            values = {
                "num_requests_running": load.num_running,
                "num_requests_waiting": load.num_waiting,
                "num_tokens_waiting": load.num_queued_tokens,
                "kv_cache_usage_perc": stats.used_pages / max(1, stats.total_pages),
                "kv_cache_cached_perc": stats.cached_pages / max(1, stats.total_pages),
                "kv_blocks_pending_offer": stats.blocks_pending_offer,
                "store_leased_slots": stats.leased_slots,
            }
            for name, value in values.items():
                gauges[name].add_metric([replica_id], value)
            preemptions.add_metric([replica_id], stats.num_preemptions)
            steps.add_metric([replica_id], stats.num_steps)
        yield from (*gauges.values(), preemptions, steps)


_GAUGES = {
    "num_requests_running": "Requests in the batch",
    "num_requests_waiting": "Requests in the queue",
    "num_tokens_waiting": "Prompt tokens not yet computed",
    "kv_cache_usage_perc": "Share of the pages that live requests hold; 1 is all",
    "kv_cache_cached_perc": "Share of the pages that hold reusable blocks and nobody uses; 1 is all",
    "kv_blocks_pending_offer": "Full blocks for which the store has not answered yet",
    "store_leased_slots": "Store slots that the engine holds",
}


class MetricsServer:
    """The HTTP endpoint of one registry, on a thread of its own. `close` ends it."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Listens at once; OSError when the address is taken. Port 0 picks one."""
        self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        self.address = f"{f'[{host}]' if ':' in host else host}:{self._server.server_port}"

    def close(self, timeout_s: float = 5.0) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout_s)
