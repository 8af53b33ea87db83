"""The figures of one front door, in a registry of its own that is passed down. Named as vLLM's where they mean the same."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_TTFT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40, 80)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class FrontDoorMetrics:
    """Written by the front door alone."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mobula:requests",
            "Generate calls by how they ended: stop, length, abort, cancelled, or an error's label",
            ["status"],
            registry=self.registry,
        )
        self.live_requests = Gauge("mobula:num_requests_live", "Generate calls that have not ended", registry=self.registry)
        self.prompt_tokens = Counter("mobula:prompt_tokens", "Prompt tokens of admitted requests", registry=self.registry)
        self.generation_tokens = Counter("mobula:generation_tokens", "Output tokens sent to clients", registry=self.registry)
        self.cached_tokens = Counter(
            "mobula:prompt_tokens_cached", "Prompt tokens that were not computed, by tier", ["tier"], registry=self.registry
        )
        self.ttft_s = Histogram(
            "mobula:time_to_first_token_seconds", "Arrival to first token", buckets=_TTFT_BUCKETS_S, registry=self.registry
        )
        self.inter_token_s = Histogram(
            "mobula:inter_token_latency_seconds",
            "Time between events of one request, per token they carry",
            buckets=_INTER_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self.request_s = Histogram(
            "mobula:e2e_request_latency_seconds", "Arrival to the last event", buckets=_REQUEST_BUCKETS_S, registry=self.registry
        )

    def render(self) -> bytes:
        """The text format that a Prometheus server reads."""
        return generate_latest(self.registry)
