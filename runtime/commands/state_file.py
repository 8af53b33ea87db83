"""Where a running deployment of this user can be found from another shell: one small file per deployment, gone when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from runtime.config import DEFAULT_DEPLOYMENT
from runtime.errors import DeploymentError


class RunningDeployment(NamedTuple):
    endpoint: str  # HOST:PORT of the front door
    ray_address: str
    owner_pid: int  # 0: detached on a Ray cluster that was there before


def _path(deployment: str) -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or os.path.join(tempfile.gettempdir(), f"mobula-{os.getuid()}")
    return Path(base) / f"mobula-{deployment}.json"


def write_state(deployment: str, running: RunningDeployment) -> None:
    path = _path(deployment)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(running._asdict()))
    scratch.replace(path)


def remove_state(deployment: str) -> None:
    _path(deployment).unlink(missing_ok=True)


@contextlib.contextmanager
def announced(deployment: str, running: RunningDeployment) -> Iterator[None]:
    write_state(deployment, running)
    try:
        yield
    finally:
        remove_state(deployment)


def find_state(deployment: str) -> RunningDeployment | None:
    """What runs under that name, or None. A file whose owner is gone is removed."""
    try:
        running = RunningDeployment(**json.loads(_path(deployment).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if running.owner_pid and not Path(f"/proc/{running.owner_pid}").exists():
        remove_state(deployment)
        return None
    return running


def require_state(deployment: str) -> RunningDeployment:
    running = find_state(deployment)
    if running is None:
        raise DeploymentError(f"no deployment named {deployment!r} was started by this user on this machine; give --address HOST:PORT")
    return running


def find_endpoint(address: str | None, deployment: str | None) -> str:
    """The front door that was named, else that of a deployment of this user's. DeploymentError when there is none."""
    return address or require_state(deployment or DEFAULT_DEPLOYMENT).endpoint
