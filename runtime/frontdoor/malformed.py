"""What is wrong with bytes that are no message of the expected type."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet


def describe_malformed(payload: bytes, expected: type[Message]) -> str:
    """Names the text field that is not UTF-8, which is what clients get wrong; else the whole request."""
    try:
        field = _field_of_bad_text(payload, expected.DESCRIPTOR)
    except DecodeError:
        field = ""
    return f"{field}: is not valid UTF-8" if field else f"request: is not a {expected.DESCRIPTOR.name} message"


def _field_of_bad_text(payload: bytes, descriptor: Any) -> str:
    """The path of the first one. An empty message takes every field as unknown, which leaves reading the wire to the library."""
    unknown_fields: Any = UnknownFieldSet(Empty.FromString(payload))  # its type stubs lack iteration
    for unknown in unknown_fields:
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is None or not isinstance(unknown.data, bytes):
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                unknown.data.decode()
            except UnicodeDecodeError:
                return str(field.name)
        elif field.message_type is not None:
            inner = _field_of_bad_text(unknown.data, field.message_type)
            if inner:
                return f"{field.name}.{inner}"
    return ""
