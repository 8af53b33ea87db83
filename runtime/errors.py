"""The errors a request can end with, and the one table that gives each its gRPC status and metric label.

`BY_NAME` lets an engine report an error to a front door by name.
"""

from __future__ import annotations

import grpc

from cache_store.errors import MobulaError as MobulaError
from cache_store.errors import StoreError as StoreError
from workers.errors import CheckpointError as CheckpointError
from workers.errors import GroupFailed as GroupFailed
from workers.errors import NotEnoughMemory as NotEnoughMemory


class BadRequest(MobulaError):
    """The caller's fault; the message starts with the name of the field."""


class UnknownModel(MobulaError):
    """The request names a model that is not served here."""


class NoTokenizer(MobulaError):
    """Text or chat was sent to a model without a tokenizer or chat template."""


class Overloaded(MobulaError):
    """A queue is full. `retry_after_ms` travels as trailing metadata grpc-retry-pushback-ms."""

    def __init__(self, message: str, retry_after_ms: int = 500) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DeadlinePassed(MobulaError):
    """The client's deadline passed before the output was complete."""


class DuplicateRequest(MobulaError):
    """The request id is in use by a live request of the same tenant."""


class NoReplica(MobulaError):
    """No replica is ready to take the request."""


class ReplicaLost(MobulaError):
    """The replica that held the request died."""


class SuspectRequest(MobulaError):
    """The request ran on two replicas that died. To send it again at once may end a third."""


class Unauthenticated(MobulaError):
    """A call without an API key that is known, or an internal channel without the cluster's secret."""


class DeploymentError(MobulaError):
    """The deployment cannot be started, found or removed; the message says what to do."""


class UsageError(MobulaError):
    """The command line, a settings file or the environment asks for something that cannot be; the message names it."""


STATUS: dict[type[MobulaError], tuple[grpc.StatusCode, str]] = {
    BadRequest: (grpc.StatusCode.INVALID_ARGUMENT, "bad_request"),
    UnknownModel: (grpc.StatusCode.NOT_FOUND, "unknown_model"),
    NoTokenizer: (grpc.StatusCode.FAILED_PRECONDITION, "no_tokenizer"),
    Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded"),
    DeadlinePassed: (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline"),
    DuplicateRequest: (grpc.StatusCode.ALREADY_EXISTS, "duplicate_request"),
    NoReplica: (grpc.StatusCode.UNAVAILABLE, "no_replica"),
    ReplicaLost: (grpc.StatusCode.UNAVAILABLE, "replica_lost"),
    SuspectRequest: (grpc.StatusCode.INTERNAL, "suspect_request"),
    Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated"),
    DeploymentError: (grpc.StatusCode.FAILED_PRECONDITION, "deployment"),
    UsageError: (grpc.StatusCode.INVALID_ARGUMENT, "usage"),
    GroupFailed: (grpc.StatusCode.UNAVAILABLE, "group_failed"),
    NotEnoughMemory: (grpc.StatusCode.RESOURCE_EXHAUSTED, "not_enough_memory"),
    CheckpointError: (grpc.StatusCode.FAILED_PRECONDITION, "checkpoint"),
    StoreError: (grpc.StatusCode.UNAVAILABLE, "store"),
    MobulaError: (grpc.StatusCode.INTERNAL, "internal"),
}

BY_NAME: dict[str, type[MobulaError]] = {error.__name__: error for error in STATUS}


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status and metric label of the nearest class in the table; INTERNAL for anything that is not ours."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    return grpc.StatusCode.INTERNAL, "internal"
