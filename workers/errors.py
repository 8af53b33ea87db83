"""Errors of checkpoints and of the ranks that run them."""

from cache_store.errors import MobulaError


class CheckpointError(MobulaError):
    """A checkpoint that cannot be served; the message names the file, the tensor or the config field."""


class UnknownArchitecture(CheckpointError):
    """config.json names a model class that is not in the table of models."""


class UnsupportedConfig(CheckpointError):
    """A known architecture with a setting that is not built (activation, rope type, mixed layers, tensor-parallel size)."""


class BadTensor(CheckpointError):
    """A tensor is missing, mis-shaped or unreadable."""


class NotEnoughMemory(MobulaError):
    """The device cannot hold the weights, or at least the pages of one longest request."""


class GroupFailed(MobulaError):
    """A rank died, missed its deadline or lost a plan. The whole group has ended; names the rank and what was seen."""
