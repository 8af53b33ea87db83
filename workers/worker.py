"""One rank's process: connects to its engine, loads a model when told, then executes plans one after the other until the engine goes.

thread    does                                                   ends with
main      waits for a frame or a finished copy; launches plans   Close, end of stream, or the first error, which it reports
answers   on CUDA: waits for launched steps, answers them        the model
copies    pages <-> arena (`workers.kv.transfer`)                the model
watch     notices that the engine has gone while main is busy    main; ends the process when main does not come back

python -m workers.worker --connect ADDRESS --rank R     the secret comes in MOBULA_SECRET
python -m workers.worker --pool                         serves the groups named on stdin, {address, rank, secret} a line
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cache_store.processes import process_identity
from workers.answers import AnswerThread
from workers.config import WorkerConfig
from workers.connection import Connection, Disconnected, connect
from workers.engine_watch import EngineWatch
from workers.errors import GroupFailed
from workers.step import ArenaSpec, RowResult, StepPlan, StepResult
from workers.wire import (
    Ack,
    Close,
    CopiesDone,
    Hello,
    Host,
    Hosted,
    Load,
    Loaded,
    Message,
    Ping,
    Pong,
    Progress,
    RankError,
    RankFacts,
    Refused,
    Unload,
    Unloaded,
    Welcome,
    encode,
)

if TYPE_CHECKING:
    from workers.kv.layout import PageLayout
    from workers.kv.transfer import PageCopier

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
WELCOME_TIMEOUT_S = 300.0  # the engine lets everybody in before it has time for anybody
SEND_TIMEOUT_S = 60.0
LAST_WORD_TIMEOUT_S = 1.0
LOADS_TIMEOUT_S = 60.0
MAX_ERROR_CHARS = 4000
EXIT_GRACE_S = 5.0
IDLE = "idle"


class RankParts(NamedTuple):
    """What a rank is made of, as "module:attribute", so that it can be said on a command line. Imported when a model is loaded."""

    runner: str = "workers.runner:Runner"
    communicator: str = "workers.parallel:Communicator"


MODEL = RankParts()
PRELOADED = ("torch", "workers.runner")
PRELOADED_ON_CUDA = ("workers.attention.flashinfer", "flashinfer")
ECHO = RankParts("workers.echo:EchoRunner", "workers.echo:NoCommunicator")


class RunnerLike(Protocol):
    """What a rank asks of its runner."""

    layout: PageLayout
    pool: Any
    info_fields: dict[str, Any]  # of workers.step.GroupInfo, all but pids

    @property
    def gates(self) -> Any:
        """workers.kv.gates.LayerGates; None where a step is launched when its loads are done."""
        ...

    def launch(self, plan: StepPlan, before_forward: Callable[[bool], None]) -> Any:
        """Queues a step. Calls `before_forward` once, when all is ready for the forward pass: whether that waits at `gates`, if any."""
        ...

    def collect(self, launched: Any) -> list[RowResult]:
        """Waits for a launched step. On another thread than `launch` where `is_asynchronous`."""
        ...

    @property
    def is_asynchronous(self) -> bool:
        """Whether `launch` returns before the step is done."""
        ...

    def close(self) -> None: ...


def run_rank(address: str, rank: int, secret: str, *, parts: RankParts = MODEL, exit_grace_s: float | None = EXIT_GRACE_S) -> None:
    """Serves the engine at `address` until it says Close or its socket ends, then returns.

    Args:
        exit_grace_s: how long after the engine is gone the forward pass or load in progress may still run; then the process is ended,
            since a collective whose other ranks are gone may never return. None: never.

    GroupFailed when no engine answers or it refuses this rank. Any error of the model is reported to the engine, then raised.
    """
    try:
        sock = connect(address, CONNECT_TIMEOUT_S)
    except Disconnected as error:
        raise GroupFailed(f"rank {rank}: {error}") from error
    connection = Connection(sock)
    watch = EngineWatch(sock, exit_grace_s) if exit_grace_s is not None else None
    worker = Rank(connection, rank, parts)
    try:
        worker.join(secret)
        worker.serve()
    except Disconnected as error:
        log.info("rank %d: the engine has gone: %s", rank, error)
    except Exception as error:
        log.exception("rank %d has failed", rank)
        worker.report(error)
        raise
    finally:
        worker.unload()
        if watch is not None:
            watch.close()
        connection.close()


class Rank:
    """What one rank is: its connection, and what `Load` made of it. One thread; `unload` frees all but the connection."""

    def __init__(self, connection: Connection, rank: int, parts: RankParts) -> None:
        self._connection = connection
        self._rank = rank
        self._parts = parts
        self._world_size = 0
        self._sequence = 0  # of the last plan executed
        self._closed = False
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._rendezvous: Any = None
        self._communicator: Any = None
        self._runner: RunnerLike | None = None
        self._copier: PageCopier | None = None
        self._answers: AnswerThread | None = None
        self._sending = threading.RLock()  # protects the connection's unsent frames

    def join(self, secret: str) -> None:
        """Says Hello and waits to be let in. GroupFailed when refused; Disconnected."""
        pid, start_ticks = process_identity(os.getpid())
        self._say(Hello(self._rank, pid, start_ticks, secret))
        deadline_s = time.monotonic() + WELCOME_TIMEOUT_S
        while not self._world_size:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise GroupFailed(f"the engine has not answered within {WELCOME_TIMEOUT_S:g} s")
            self._readable.poll(left_s * 1000)
            for message in self._connection.receive():
                self._take(message)

    def serve(self) -> None:
        """Does what the engine says, in its order; sends finished copies as they come, between plans too. Disconnected at the end."""
        while not self._closed:
            for fd, _ in self._readable.poll():  # no deadline: the end of the engine ends it
                if fd == self._connection.fileno():
                    for message in self._connection.receive():
                        self._take(message)
            if self._answers is not None:
                self._answers.check()
            self._send_copies()

    def report(self, error: Exception) -> None:
        """Tells the engine why this rank ends, and hangs up."""
        with contextlib.suppress(Disconnected):
            self._connection.send(encode(RankError(type(error).__name__, str(error)[:MAX_ERROR_CHARS])))
        self._connection.close_after_last_word(LAST_WORD_TIMEOUT_S)

    def unload(self) -> None:
        """Frees the model and leaves its communicator. Idempotent."""
        if self._answers is not None:
            self._readable.unregister(self._answers)
            self._answers.close()
        if self._copier is not None:
            self._readable.unregister(self._copier)
            self._copier.close()
        for part in (self._runner, self._communicator, self._rendezvous):
            if part is not None:
                part.close()
        self._answers = self._copier = self._runner = self._communicator = self._rendezvous = None
        self._sequence = 0
        gc.unfreeze()
        gc.collect()  # before another model is loaded into the same memory

    def _say(self, message: Message) -> None:
        frame = encode(message)
        with self._sending:
            self._connection.send(frame)
            if self._connection.num_unsent_frames:
                self._connection.drain(SEND_TIMEOUT_S)

    def _take(self, message: Message) -> None:
        if isinstance(message, StepPlan):
            self._execute(message)
        elif isinstance(message, Ping):
            self._say(Pong(message.number))
        elif isinstance(message, ArenaSpec):
            self._loaded()[1].attach(message)
        elif isinstance(message, Unload):
            self.unload()
            self._say(Unloaded())
        elif isinstance(message, Host):
            self._rendezvous = load_attribute(self._parts.communicator).host(self._world_size, message.host)
            self._say(Hosted(self._rendezvous.port))
        elif isinstance(message, Load):
            self._load(message)
        elif isinstance(message, Welcome):
            self._world_size = message.world_size
        elif isinstance(message, Refused):
            raise GroupFailed(f"the engine refuses rank {self._rank}: {message.reason}")
        elif isinstance(message, Close):
            self._closed = True
        else:
            raise ValueError(f"an engine does not say {type(message).__name__}")

    def _execute(self, plan: StepPlan) -> None:
        runner, copier = self._loaded()
        if plan.sequence != self._sequence + 1:
            raise ValueError(f"plan {plan.sequence} came where {self._sequence + 1} is next")
        self._sequence = plan.sequence
        num_batches = 0 if plan.waits else copier.submit(plan.loads, [])  # they touch no page of this step, so they run beside it
        started_s = time.perf_counter()

        def await_loads() -> None:
            if plan.waits:
                copier.await_loads(num_batches, LOADS_TIMEOUT_S)
                self._send_copies()

        def before_forward(has_gates: bool) -> None:
            nonlocal num_batches
            if plan.waits:  # what the step itself sends to the device has been sent: it would go there behind the pages
                num_batches = copier.submit(plan.loads, [])
                if not (has_gates and copier.gate_loads(LOADS_TIMEOUT_S)):
                    await_loads()

        launched = runner.launch(plan, before_forward)

        def answer() -> None:
            rows = runner.collect(launched)
            await_loads()  # the engine learns of a load that failed before it learns what the step made of it
            forward_s = time.perf_counter() - started_s
            self._say(StepResult(plan.sequence, rows, forward_s) if self._rank == 0 else Ack(plan.sequence))

        if self._answers is not None:
            self._answers.put(answer)
            copier.submit([], plan.saves)
        else:
            copier.submit([], plan.saves)
            answer()
        self._send_copies()

    def _send_copies(self) -> None:
        with self._sending:  # whoever takes results sends them before anybody sends anything else
            results = self._copier.results() if self._copier is not None else []
            if results:
                self._say(CopiesDone(results))

    def _loaded(self) -> tuple[RunnerLike, PageCopier]:
        if self._runner is None or self._copier is None:
            raise ValueError("no model is loaded")
        return self._runner, self._copier

    def _load(self, message: Load) -> None:
        from workers.kv.transfer import PageCopier  # brings in numpy

        config = WorkerConfig(**message.config)
        device = pick_device(config.device, self._rank)
        communicator = load_attribute(self._parts.communicator)
        make_runner = load_attribute(self._parts.runner)
        if device == "cpu":
            limit_torch_threads()
        if self._world_size == 1:
            self._communicator = communicator.single(device)
        else:
            self._communicator = communicator.connect(
                self._rank, self._world_size, message.host, message.port, device, store=self._rendezvous
            )
        runner = self._runner = make_runner(config, self._communicator, self._report_progress)
        layout: PageLayout = runner.layout
        self._copier = PageCopier(runner.pool, layout, runner.gates)
        self._readable.register(self._copier, select.POLLIN)
        if runner.is_asynchronous:
            self._answers = AnswerThread()
            self._readable.register(self._answers, select.POLLIN)
        written: dict[str, Any] = {"first_written_part": layout.first_written_part, "num_written_parts": layout.num_written_parts}
        gc.freeze()  # the model stays: no step pays for a collection that walks over it
        self._say(Loaded(RankFacts(**runner.info_fields, **written)))

    def _report_progress(self, phase: str, done: int, total: int) -> None:
        self._say(Progress(phase, done, total))


def preload() -> threading.Thread:
    """Begins to import what a model needs, while there is none yet: seconds, the most of them for CUDA. What is missing or broken is
    reported by whoever imports it next."""

    def run() -> None:
        with contextlib.suppress(Exception):
            for name in PRELOADED:
                importlib.import_module(name)
            for name in PRELOADED_ON_CUDA if sys.modules["torch"].cuda.is_available() else ():
                importlib.import_module(name)

    thread = threading.Thread(target=run, name="preload", daemon=True)
    thread.start()
    return thread


def load_attribute(name: str) -> Any:
    """ "module:attribute" -> the attribute."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def pick_device(name: str, rank: int) -> str:
    """The torch device of a rank: ranks that see several GPUs take one each, in order. ValueError when there are none."""
    if name == "cpu":
        return "cpu"
    import torch

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_devices == 0 and name == "auto":
        return "cpu"
    if num_devices == 0:
        raise ValueError(f"the device is {name!r}, but this process sees no CUDA device")
    return f"cuda:{rank % num_devices}"


def limit_torch_threads() -> None:
    """One thread unless MOBULA_NUM_THREADS says otherwise: ranks that each take all cores slow each other down tenfold."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ.get("MOBULA_NUM_THREADS", "1")))


def serve_pool() -> None:
    """Serves one group after the other, as lines on stdin say, until stdin ends. Prints "idle" when it is ready for the next."""
    print(IDLE, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        run_rank(order["address"], order["rank"], order["secret"], parts=RankParts(*order.get("parts", MODEL)))
        print(IDLE, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.worker", description="One rank of a tensor-parallel group.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--connect", metavar="ADDRESS", help="of the engine: unix:/path or tcp:host:port; the secret is in MOBULA_SECRET")
    mode.add_argument("--pool", action="store_true", help="serve the groups named on stdin, one JSON object {address, rank, secret} a line")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--runner", default=MODEL.runner, help="module:attribute that makes the runner")
    parser.add_argument("--communicator", default=MODEL.communicator, help="module:attribute that lets ranks talk to each other")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if arguments.pool:
        serve_pool()
    else:
        parts = RankParts(arguments.runner, arguments.communicator)
        if parts == MODEL:
            preload()
        run_rank(arguments.connect, arguments.rank, os.environ.get("MOBULA_SECRET", ""), parts=parts)


if __name__ == "__main__":
    main()
