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
    table = Table(title="stores")
    for column in ("node", "state", "blocks", "MiB used", "MiB", "leased slots", "quarantined", "hits", "misses", "evictions"):
        table.add_column(column, justify="left" if column in ("node", "state") else "right")
    for row in answer.stores:
        sizes = (row.blocks, row.used_bytes >> 20, row.total_bytes >> 20)
        counts = (row.leased_slots, row.quarantined_slots, row.hits, row.misses, row.evictions)
        table.add_row(row.node_id[:12], row.state, *(str(count) for count in (*sizes, *counts)))
    return table
