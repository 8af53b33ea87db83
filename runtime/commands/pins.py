"""`mobula cache pin`, `list`, `unpin`: prefixes that the cluster's stores keep for the caller's tenant."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from protos import inference_pb2 as pb
from runtime.client import InferenceClient
from runtime.commands.prompt import Prompt
from runtime.errors import DeploymentError, UsageError

SHOWN_WITHIN_S = 10.0  # a pin that was taken: its blocks are copied into the store first
LOOK_EVERY_S = 0.1

_IGNORED = {
    "no_store": "the replica has no store (--store-memory)",
    "too_many": "the replica has too many others under way; try again later",
    "too_short": "the prompt has no full block",
}


def pin_command(address: str, api_key: str, prompt: Prompt, ttl_s: float, cache_salt: str, *, as_json: bool, console: Console) -> None:
    """Computes the prompt, where it is not there already, and prints the pin once a store shows it. DeploymentError when none does."""
    if not ttl_s > 0:
        raise UsageError(f"--ttl: must be greater than 0, not {ttl_s:g}")
    request = pb.GenerateRequest(cache_salt=cache_salt, pin_ttl_s=ttl_s, sampling=pb.SamplingParams(max_tokens=1))
    prompt.put_into(request)
    with InferenceClient(address, api_key=api_key) as client:
        before = {pin.pin_id: pin.remaining_s for pin in client.list_pins().pins}
        outcome = client.generate(request).usage.get("pin", "")
        if outcome != "taken":
            raise DeploymentError(f"not pinned: {_IGNORED.get(outcome, 'the service does not say why')}")
        pin = _await_pin(client, before)
    if as_json:
        print(json.dumps(_fields(pin)))
    else:
        console.print(_table([pin]))


def _await_pin(client: InferenceClient, before: dict[str, float]) -> pb.Pin:
    """The pin that is new, or ends later than it did."""
    deadline_s = time.monotonic() + SHOWN_WITHIN_S
    while True:
        for pin in client.list_pins().pins:
            if pin.remaining_s > before.get(pin.pin_id, 0.0):
                return pin
        if time.monotonic() >= deadline_s:
            raise DeploymentError(
                f"no new pin shows after {SHOWN_WITHIN_S:g} s: the tenant's quota may be used up, or a pin that ends later keeps the prefix"
            )
        time.sleep(LOOK_EVERY_S)


def list_command(address: str, api_key: str, *, as_json: bool, console: Console) -> None:
    with InferenceClient(address, api_key=api_key) as client:
        answer = client.list_pins()
    if as_json:
        print(json.dumps({"pins": [_fields(pin) for pin in answer.pins], "unreachable_nodes": list(answer.unreachable_nodes)}))
        return
    console.print(_table(answer.pins))
    _warn(answer.unreachable_nodes, console)


def unpin_command(address: str, api_key: str, pin_ids: Sequence[str], *, everything: bool, console: Console) -> None:
    if everything == bool(pin_ids):
        raise UsageError("give pins as `mobula cache list` shows them, or --all")
    with InferenceClient(address, api_key=api_key) as client:
        answer = client.unpin(pin_ids, everything=everything)
    console.print(f"{answer.num_unpinned} unpinned")
    _warn(answer.unreachable_nodes, console)


def _warn(nodes: Sequence[str], console: Console) -> None:
    for node in nodes:
        console.print(f"the store of node {node} does not answer: its pins are as they were")


def _fields(pin: pb.Pin) -> dict[str, object]:
    return {field.name: getattr(pin, field.name) for field in pin.DESCRIPTOR.fields}


def _table(pins: Sequence[pb.Pin]) -> Table:
    table = Table(title="pins")
    table.add_column("pin", no_wrap=True)  # to be copied
    for column in ("blocks", "MiB", "ends in"):
        table.add_column(column, justify="right")
    for pin in pins:
        table.add_row(pin.pin_id, str(pin.num_blocks), f"{pin.num_bytes / (1 << 20):.1f}", f"{pin.remaining_s:.0f} s")
    return table
