"""A Ray call that is looked at, never waited for."""

from __future__ import annotations

import time
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class RemoteCallFailed(Exception):
    """The callee is dead, raised, or did not answer by the deadline."""


class RemoteCall(Generic[T]):
    """Wraps an object reference. `poll` says None until the answer is there."""

    def __init__(self, reference: Any, what: str, timeout_s: float) -> None:
        self._reference = reference
        self._what = what
        self._deadline = time.monotonic() + timeout_s

    def poll(self) -> T | None:
        import ray

        done, _ = ray.wait([self._reference], timeout=0)
        if not done:
            if time.monotonic() > self._deadline:
                raise RemoteCallFailed(f"{self._what} did not answer in time")
            return None
        try:
            answer: T = ray.get(self._reference)
        except ray.exceptions.RayTaskError as error:
            raise RemoteCallFailed(f"{self._what}: {error.cause or error}") from error
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()
            raise RemoteCallFailed(f"{self._what}: {type(error).__name__}: {reason[0] if reason else ''}") from error
        return answer
