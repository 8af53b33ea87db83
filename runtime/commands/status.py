"""`mobula status`: every replica and store behind a front door, and the front door itself; once, or again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from google.protobuf.message import Message
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from protos import inference_pb2 as pb
from runtime.client import InferenceClient, RemoteError


def print_json(address: str, api_key: str) -> None:
    """One line on stdout."""
    with InferenceClient(address, api_key=api_key) as client:
        answer = client.status()
    rows = {"replicas": [_fields(row) for row in answer.replicas], "stores": [_fields(row) for row in answer.stores]}
    print(json.dumps({**rows, "front_door": _fields(answer.front_door)}))


def show(address: str, api_key: str, console: Console) -> None:
    with InferenceClient(address, api_key=api_key) as client:
        console.print(_tables(address, client.status()))


def watch(address: str, api_key: str, console: Console, *, every_s: float, wait: Callable[[float], None] = time.sleep) -> None:
    """Until Ctrl-C. A front door that does not answer is said so and asked again."""
    with InferenceClient(address, api_key=api_key) as client, Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                try:
                    live.update(_tables(address, client.status(timeout_s=max(1.0, every_s))), refresh=True)
                except RemoteError as error:
                    live.update(Text(f"{address}: {error}"), refresh=True)
                wait(every_s)
        except KeyboardInterrupt:
            return


def _tables(address: str, answer: pb.GetStatusResponse) -> Group:
    door = answer.front_door
    line = f"front door {address}: {door.live_requests} requests live, {door.reserved_tokens} prompt tokens on their way to replicas"
    if door.metrics_address:
        line += f"; metrics http://{door.metrics_address}/metrics"
    return Group(_replica_table(answer), _store_table(answer), Text(line))


def _fields(row: Message) -> dict[str, object]:
    return {field.name: getattr(row, field.name) for field in row.DESCRIPTOR.fields}


def _replica_table(answer: pb.GetStatusResponse) -> Table:
    table = Table(title="replicas")
    for column in (
        "replica",
        "state",
        "tp",
        "running",
        "waiting",
        "pages used",
        "cached",
        "of",
        "pending offers",
        "leased slots",
        "preemptions",
    ):
        table.add_column(column, justify="left" if column in ("replica", "state") else "right")
    for row in answer.replicas:
        counts = (row.tensor_parallel_size, row.running, row.waiting, row.used_pages, row.cached_pages, row.total_pages)
        more = (row.blocks_pending_offer, row.leased_slots, row.num_preemptions)
        table.add_row(row.replica_id, f"{row.state} {row.detail}".strip(), *(str(count) for count in (*counts, *more)))
    return table


def _store_table(answer: pb.GetStatusResponse) -> Table:
    """Columns of what no store has are left out."""
    rows = answer.stores
    columns: dict[str, list[object]] = {
        "node": [row.node_id[:12] for row in rows],
        "state": [row.state for row in rows],
        "blocks": [row.blocks for row in rows],
        "MiB used": [row.used_bytes >> 20 for row in rows],
        "MiB": [row.total_bytes >> 20 for row in rows],
        "leased slots": [row.leased_slots for row in rows],
        "quarantined": [row.quarantined_slots for row in rows],
        "hits": [row.hits for row in rows],
        "misses": [row.misses for row in rows],
        "evictions": [row.evictions for row in rows],
    }
    if any(row.pinned_bytes for row in rows):
        columns["pins"] = [row.num_pins for row in rows]
        columns["MiB pinned"] = [round(row.pinned_bytes / (1 << 20), 1) for row in rows]
    if any(row.disk_total_bytes for row in rows):
        columns["blocks on disk"] = [row.disk_blocks for row in rows]
        columns["MiB on disk"] = [row.disk_bytes >> 20 for row in rows]
        columns["of disk"] = [row.disk_total_bytes >> 20 for row in rows]
    if any(row.num_peers for row in rows):
        columns["peers"] = [row.num_peers for row in rows]
    table = Table(title="stores")
    for name in columns:
        table.add_column(name, justify="left" if name in ("node", "state") else "right")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(str, cells))
    return table
