"""`mobula serve` and `mobula shutdown`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from rich.console import Console

from runtime.commands.models import announce_model
from runtime.commands.progress import LoadProgress
from runtime.commands.state_file import RunningDeployment, announced, find_state, remove_state, require_state, write_state
from runtime.config import ServeSettings
from runtime.controller.deployment import Deployment, attach, deployed, launch
from runtime.controller.ray_cluster import ray_session
from runtime.controller.spec import namespace_of
from runtime.errors import DeploymentError

READY_TIMEOUT_S = 1800.0
SHUTDOWN_TIMEOUT_S = 60.0
INTERRUPT_POLL_S = 0.5


def serve(settings: ServeSettings, console: Console) -> None:
    """Runs until Ctrl-C or SIGTERM, then drains and removes the deployment."""
    announce_model(settings, console)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with deployed(settings) as deployment:
        with LoadProgress(console) as progress:
            report = deployment.wait_ready(READY_TIMEOUT_S, progress.show)
        _tell_metrics(deployment, report.endpoint, console)
        running = RunningDeployment(report.endpoint, deployment.session.address, os.getpid())
        with announced(settings.deployment, running):
            print(f"ready {report.endpoint}", flush=True)
            _wait_for_interrupt()
        console.print("draining", highlight=False)


def _tell_metrics(deployment: Deployment, endpoint: str, console: Console) -> None:
    if deployment.spec.settings.metrics_port is not None:
        console.print(f"metrics http://{deployment.metrics_address(endpoint)}/metrics", highlight=False, soft_wrap=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _wait_for_interrupt() -> None:
    """Looks up now and then: a signal that comes just before the main thread blocks does not wake it."""
    forever = threading.Event()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            forever.wait(INTERRUPT_POLL_S)


def serve_detached(settings: ServeSettings, console: Console, arguments: list[str]) -> None:
    """Leaves the deployment running: on the Ray cluster of RAY_ADDRESS, else under a process of its own that owns a local one."""
    announce_model(settings, console)
    if find_state(settings.deployment) is not None:
        raise DeploymentError(f"a deployment named {settings.deployment!r} runs already; end it with mobula shutdown")
    if os.environ.get("RAY_ADDRESS"):
        with ray_session(namespace_of(settings.deployment)) as session:
            deployment = launch(settings, session, front_doors=True, owned=False)
            try:
                with LoadProgress(console) as progress:
                    report = deployment.wait_ready(READY_TIMEOUT_S, progress.show)
            except BaseException:
                deployment.close()
                raise
            write_state(settings.deployment, RunningDeployment(report.endpoint, session.address, 0))
            _tell_metrics(deployment, report.endpoint, console)
            print(f"ready {report.endpoint}", flush=True)
        return
    command = [sys.executable, "-m", "runtime.cli", *(argument for argument in arguments if argument != "--detach")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        assert owner.stdout is not None
        for line in owner.stdout:
            if line.startswith("ready "):
                print(line, end="", flush=True)
                return
    except KeyboardInterrupt:
        owner.terminate()
        owner.wait(SHUTDOWN_TIMEOUT_S)
        raise
    raise DeploymentError(f"the deployment did not start (exit code {owner.wait(SHUTDOWN_TIMEOUT_S)})")


def shutdown(deployment: str, console: Console) -> None:
    """Removes a deployment that this user started: asks its owner, or removes it from the shared Ray cluster by name."""
    if os.environ.get("RAY_ADDRESS") and find_state(deployment) is None:
        _remove_from_ray(deployment, None)
    else:
        running = require_state(deployment)
        if running.owner_pid:
            os.kill(running.owner_pid, signal.SIGTERM)
            _wait_for(lambda: find_state(deployment) is None and not _is_alive(running.owner_pid), running.owner_pid)
        else:
            _remove_from_ray(deployment, running.ray_address)
    remove_state(deployment)
    console.print(f"deployment {deployment} removed")


def _remove_from_ray(deployment: str, address: str | None) -> None:
    with ray_session(namespace_of(deployment), address=address) as session:
        attach(deployment, session).close()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wait_for(done: Callable[[], bool], pid: int) -> None:
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
    while not done():
        if time.monotonic() > deadline:
            raise DeploymentError(f"the owner, process {pid}, has not ended after {SHUTDOWN_TIMEOUT_S:.0f} s")
        time.sleep(0.05)
