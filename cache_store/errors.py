"""The root of the project's error tree, and the store's branch of it.

`workers.errors` and `runtime.errors` add their branches; `runtime.errors` maps every class to a gRPC status and a metric label.
"""


class MobulaError(Exception):
    """Anything that goes wrong for a reason worth naming. The message says what, where and what to do."""


class StoreError(MobulaError):
    """The cache store could not do what was asked. For a request this is a miss, never a failure."""


class StoreUnavailable(StoreError):
    """The store does not answer, or answered as a later epoch than the caller attached to."""


class ArenaTooSmall(StoreError):
    """The arena's file system cannot hold what was asked for, or a block is larger than an extent."""


class LayoutMismatch(StoreError):
    """Blocks of one session cannot be read or written under another layout."""


class StoreRefused(StoreError):
    """The store will not do this for this caller: a wrong secret, a full table, or a process that it may not register."""
