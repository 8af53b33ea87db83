"""Everything the store counts, as Prometheus metrics: over the Metrics rpc, and on a port of its own where one is asked for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cache_store.errors import StoreRefused
from cache_store.tiers.dram import AGE_BOUNDS_S, AgeCounts

if TYPE_CHECKING:
    from cache_store.node import StoreNode

PREFIX = "mobula_store_"
COLLECT_TIMEOUT_S = 5.0


def render(node: StoreNode) -> str:
    """The text format. On the store's loop."""
    return generate_latest(_registry(_Snapshot(families(node)))).decode()


class MetricsServer:
    """An HTTP server on a thread. `close` ends it."""

    def __init__(self, node: StoreNode, address: str) -> None:
        """HOST:PORT. StoreRefused when it cannot listen there."""
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host, _registry(_FromLoop(node, asyncio.get_running_loop())))
        except OSError as error:
            raise StoreRefused(f"metrics_address: cannot listen at {address}: {error.strerror}") from error
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(COLLECT_TIMEOUT_S)


class _Snapshot(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


class _FromLoop(Collector):
    """Asks the store's loop, whatever thread it is called on."""

    def __init__(self, node: StoreNode, loop: asyncio.AbstractEventLoop) -> None:
        self._node, self._loop = node, loop

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would call `collect`, on the loop itself

    def collect(self) -> Iterable[Metric]:
        async def ask() -> list[Metric]:
            return families(self._node)

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(COLLECT_TIMEOUT_S)


def _registry(collector: Collector) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return registry


def families(node: StoreNode) -> list[Metric]:
    return [*_sizes(node), *_traffic(node), *_leases(node), *_choices(node)]


def _sizes(node: StoreNode) -> Iterable[Metric]:
    stat = node.stat()
    yield _gauge("blocks", "Visible blocks.", "tier", {"dram": stat.blocks, "disk": stat.disk_blocks})
    yield _gauge("used_bytes", "Bytes of visible blocks.", "tier", {"dram": stat.used_bytes, "disk": stat.disk_bytes})
    yield _gauge("capacity_bytes", "Bytes that blocks may take.", "tier", {"dram": stat.total_bytes, "disk": stat.disk_total_bytes})
    yield _gauge("peers", "Stores of other nodes that answer.", "", {"": stat.num_peers})


def _traffic(node: StoreNode) -> Iterable[Metric]:
    store, disk, spiller, server = node.store, node.disk, node.spiller, node.peer_server
    accesses, brought = store.accesses, node.ledger.brought_bytes
    yield _counter("hit_blocks", "Blocks acquired, by the tier they came from.", "tier", accesses.num_hits)
    yield _counter("missed_blocks", "Blocks asked for and not there.", "reason", {str(each): n for each, n in accesses.num_misses.items()})
    yield _counter("committed_blocks", "Blocks that became visible in the arena.", "", {"": store.stat().committed_blocks})
    evicted = {"dram": store.tier.num_evicted, "disk": disk.num_evicted if disk is not None else 0}
    yield _counter("evicted_blocks", "Blocks given up for others.", "tier", evicted)
    moved = CounterMetricFamily(PREFIX + "moved_bytes", "Bytes between the arena and another tier.", labels=("tier", "direction"))
    moved.add_metric(("disk", "out"), spiller.written_bytes if spiller is not None else 0)
    moved.add_metric(("peer", "out"), server.tickets.sent_bytes if server is not None else 0)
    for tier in ("disk", "peer"):
        moved.add_metric((tier, "in"), brought[tier])
    yield moved
    corrupt = {"disk": disk.num_corrupt if disk is not None else 0, "peer": sum(peer.num_corrupt for peer in node.peers.peers)}
    yield _counter("corrupt_blocks", "Blocks whose bytes did not fit their checksums.", "tier", corrupt)
    yield _counter("lost_spills", "Blocks evicted before they were on disk.", "", {"": spiller.num_lost if spiller is not None else 0})
    yield _gauge("queued_spills", "Blocks that wait to be written to disk.", "", {"": spiller.num_queued if spiller is not None else 0})
    yield _ages(store.tier.ages_at_eviction)
    yield _gauge(
        "infinite_cache_hit_rate",
        "Estimate: part of the blocks asked for that were asked for before.",
        "",
        {"": accesses.infinite_hit_rate},
    )
    yield _gauge("sampled_share", "Part of all keys that the estimate rests on.", "", {"": accesses.sampled_share})


def _leases(node: StoreNode) -> Iterable[Metric]:
    stat = node.stat()
    slots = {"used": stat.used_slots, "free": stat.free_slots, "held": stat.held_slots, "quarantined": stat.quarantined_slots}
    yield _gauge("slots", "Slots by state; quarantined ones are among the held.", "state", slots)
    yield _gauge("pins", "Prefixes that are kept for somebody.", "", {"": stat.num_pins})
    yield _gauge("pinned_blocks", "Blocks that may not be evicted now.", "", {"": stat.pinned_blocks})
    yield _gauge("kept_bytes", "Bytes kept by pins of owners.", "", {"": stat.kept_bytes})
    yield _gauge("leases", "Read and write leases of clients.", "", {"": stat.leases})
    yield _gauge("claims", "Blocks that somebody has said to compute.", "", {"": stat.claims})
    yield _gauge("sessions", "Clients.", "", {"": stat.sessions})
    yield _counter("killed_holders", "Processes killed with slots past their deadline.", "", {"": stat.killed_holders})


def _choices(node: StoreNode) -> Iterable[Metric]:
    ledger, now_s = node.ledger, node.ledger.clock()
    chosen = CounterMetricFamily(PREFIX + "chosen_blocks", "Blocks found, by what was cheaper.", labels=("tier", "choice"))
    for tier in ledger.costs:
        chosen.add_metric((tier, "bring"), ledger.num_brought[tier])
        chosen.add_metric((tier, "compute"), ledger.num_refused[tier])
    yield chosen
    yield _counter("regret_seconds", "What bringing blocks took beyond what computing them would have.", "tier", ledger.regret_s)
    rates = {tier: cost.bytes_per_s.at(now_s) for tier, cost in ledger.costs.items()}
    latencies = {tier: cost.latency_s.at(now_s) for tier, cost in ledger.costs.items()}
    yield _gauge("rate_bytes_per_second", "Rates that choices are made with.", "tier", rates)
    yield _gauge("latency_seconds", "Latencies that choices are made with.", "tier", latencies)


def _ages(ages: AgeCounts) -> Metric:
    bounds = [*map(str, AGE_BOUNDS_S), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(ages.counts), strict=True))
    metric = HistogramMetricFamily(PREFIX + "age_at_eviction_seconds", "Time since the last use of evicted blocks.")
    metric.add_metric((), buckets, ages.sum_s)
    return metric


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    metric = GaugeMetricFamily(PREFIX + name, text, labels=(label,) if label else ())
    for value, number in values.items():
        metric.add_metric((value,) if label else (), number)
    return metric


def _counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    metric = CounterMetricFamily(PREFIX + name, text, labels=(label,) if label else ())
    for value, number in values.items():
        metric.add_metric((value,) if label else (), number)
    return metric
