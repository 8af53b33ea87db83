"""Values of a config.json, taken out one by one; what has the wrong type or size is an error that names file and field."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, TypeGuard

from workers.errors import CheckpointError, UnsupportedConfig

LARGEST = 1 << 40  # of any whole number in a config: products of a few stay sensible


class Fields:
    """One JSON object of the file at `path`. A field that is null counts as absent."""

    def __init__(self, raw: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.raw = raw
        self.path = path
        self._prefix = prefix  # of a nested object, for messages

    def unsupported(self, field: str, reason: str) -> UnsupportedConfig:
        return UnsupportedConfig(f"{self.path}: {self._prefix}{field}: {reason}")

    def wrong(self, field: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self._prefix}{field} must be {wanted}, not {self.raw.get(field)!r}")

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= LARGEST:
            raise self.wrong(name, f"an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = -math.inf, minimum: float = -math.inf) -> float:
        value = self.raw.get(name)
        if value is None:
            value = default
        if not _is_number(value) or not value > above or value < minimum:
            bound = f" above {above:g}" if above > -math.inf else f" of at least {minimum:g}" if minimum > -math.inf else ""
            raise self.wrong(name, f"a number{bound}")
        return float(value)

    def numbers(self, name: str, *, above: float) -> tuple[float, ...]:
        """A list of numbers; empty where there is none."""
        values = self.raw.get(name) or []
        if not isinstance(values, list) or not all(_is_number(each) and each > above for each in values):
            raise self.wrong(name, f"a list of numbers above {above:g}")
        return tuple(float(each) for each in values)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def nested(self, name: str) -> Fields:
        """The object under `name`; empty where there is none."""
        value = self.raw.get(name) or {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, self.path, f"{self._prefix}{name}.")


def _is_number(value: Any) -> TypeGuard[float]:
    """Of a size that a float can hold; JSON's true, NaN and Infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
