"""`mobula store`: one node's cache store, run by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cache_store.config import StoreConfig
from cache_store.server import run_store
from runtime.config import default_disk_directory, parse_size
from runtime.errors import UsageError


def store(memory: str, address: str, disk: Mapping[str, str | None], addresses: Mapping[str, Any]) -> None:
    """Serves until Ctrl-C or SIGTERM. `disk`: disk_memory and disk_directory as given; `addresses`: fields of StoreConfig."""
    secret = os.environ.get("MOBULA_SECRET")
    if not secret:
        raise UsageError("set MOBULA_SECRET to the secret that the store's users will send")
    disk_bytes = _size("--disk-memory", disk["disk_memory"] or "0")
    directory = (disk["disk_directory"] or default_disk_directory()) if disk_bytes else ""
    try:
        config = StoreConfig(
            address=address,
            memory_bytes=_size("--memory", memory),
            secret=secret,
            disk_bytes=disk_bytes,
            disk_directory=directory,
            **addresses,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    run_store(config)


def _size(flag: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error
