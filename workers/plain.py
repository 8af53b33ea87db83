"""Whether decoded values are what the annotations of a message say. A check is compiled once, where a module of messages is imported.

msgpack gives None, bool, int, float, str, bytes, list and dict. A NamedTuple within a message travels as the list of its fields, and a
float may arrive as an int.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

Check = Callable[[Any], bool]

_SIMPLE = (bool, bytes, int, str, types.NoneType)


def compile_check(hint: Any) -> Check:
    """A function that says whether a value conforms to a type hint. TypeError for hints that no message uses."""
    if hint is Any:
        return lambda value: True
    if hint is float:
        return lambda value: type(value) is float or type(value) is int
    if hint in _SIMPLE:
        return lambda value: type(value) is hint
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Union or origin is types.UnionType:
        checks = [compile_check(argument) for argument in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is list:
        return _check_list(arguments[0])
    if origin is dict:
        key, item = map(compile_check, arguments)
        return lambda value: type(value) is dict and all(map(key, value)) and all(map(item, value.values()))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return _check_fields([compile_check(argument) for argument in arguments])
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        hints = get_type_hints(hint)
        return _check_fields([compile_check(hints[name]) for name in hint._fields])
    raise TypeError(f"no message has a field of type {hint!r}")


def _check_list(element: Any) -> Check:
    if element in _SIMPLE:
        allowed = {element}
        return lambda value: type(value) is list and allowed.issuperset(map(type, value))
    check = compile_check(element)
    return lambda value: type(value) is list and all(map(check, value))


def _check_fields(checks: list[Check]) -> Check:
    num_fields = len(checks)

    def conforms(value: Any) -> bool:
        if not isinstance(value, list | tuple) or len(value) != num_fields:
            return False
        return all(check(field) for check, field in zip(checks, value, strict=True))

    return conforms
