"""The thread that waits for launched steps, so that the next plan is prepared while the device runs this one.

    main thread   launch(n) -> put ---> queue ---> this thread: collect(n) -> send the answer
                  launch(n + 1) ...

Answers leave in the order of the plans. The engine has at most a few steps on their way, which bounds the queue.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

MAX_STEPS = 16  # launched and not answered
PUT_TIMEOUT_S = 600.0  # a step may be the first of its kind, and build its kernels
_JOIN_TIMEOUT_S = 5.0

Answer = Callable[[], None]


class AnswerThread:
    """`put` queues what answers a step. When one raises, `fileno` becomes readable and `check` raises the error. `close` ends it."""

    def __init__(self, name: str = "answers") -> None:
        self._answers: queue.Queue[Answer | None] = queue.Queue(MAX_STEPS)
        self._failure: Exception | None = None
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._fd

    def put(self, answer: Answer) -> None:
        self.check()
        self._answers.put(answer, timeout=PUT_TIMEOUT_S)

    def check(self) -> None:
        """Raises what an answer has raised."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Returns once what was put is answered, or after a moment. Idempotent."""
        if self._fd < 0:
            return
        if self._failure is None:
            self._answers.put(None, timeout=_JOIN_TIMEOUT_S)
        self._thread.join(_JOIN_TIMEOUT_S)
        if not self._thread.is_alive():  # else it may still report
            os.close(self._fd)
        self._fd = -1

    def _run(self) -> None:
        try:
            while (answer := self._answers.get()) is not None:
                answer()
        except Exception as error:
            log.exception("a step cannot be answered")
            self._failure = error  # the main thread's to raise
            os.eventfd_write(self._fd, 1)
