"""`mobula store`: one node's cache store, run by hand."""

from __future__ import annotations

import os

from cache_store.config import StoreConfig
from cache_store.server import run_store
from runtime.config import parse_size
from runtime.errors import DeploymentError


def store(memory: str, address: str) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    secret = os.environ.get("MOBULA_SECRET")
    if not secret:
        raise DeploymentError("set MOBULA_SECRET to the secret that the store's users will send")
    try:
        memory_bytes = parse_size(memory)
    except ValueError as error:
        raise DeploymentError(f"--memory: {error}") from error
    run_store(StoreConfig(address=address, memory_bytes=memory_bytes, secret=secret))
