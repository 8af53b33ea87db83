"""`mobula status`: every replica and store behind a front door."""

from __future__ import annotations

import json

from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from protos import inference_pb2 as pb
from runtime.client import InferenceClient


def status(address: str, *, as_json: bool, console: Console) -> None:
    with InferenceClient(address) as client:
        answer = client.status()
    if as_json:
        print(json.dumps({"replicas": [_fields(row) for row in answer.replicas], "stores": [_fields(row) for row in answer.stores]}))
        return
    console.print(_replica_table(answer))
    console.print(_store_table(answer))


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
