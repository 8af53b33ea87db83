"""A rank must not outlive its engine."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading

log = logging.getLogger(__name__)


class EngineWatch:
    """Ends this process when the engine has gone and the main thread does not notice, since it is inside a forward pass or a load."""

    def __init__(self, sock: socket.socket, grace_s: float) -> None:
        self._grace_s = grace_s
        self._stop = threading.Event()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(sock, select.POLLRDHUP)
        self._poller.register(self._stop_fd, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="engine-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._poller.poll()
        if not self._stop.wait(self._grace_s):
            log.error("the engine has gone and this rank has not come back within %g s: ending the process", self._grace_s)
            logging.shutdown()
            os._exit(1)

    def close(self) -> None:
        """To be called before the socket is closed."""
        self._stop.set()
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        os.close(self._stop_fd)
