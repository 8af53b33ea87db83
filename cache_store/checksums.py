"""The checksum of a block's parts: xxh3-64, little-endian, part after part. Writers compute it, every reader compares it."""

from __future__ import annotations

import struct

import xxhash

CHECKSUM_BYTES = 8


def part_checksums(data: bytes | memoryview, num_parts: int) -> bytes:
    """xxh3-64 of `num_parts` equal parts of `data`. ValueError when it does not divide into them. Lets other threads run meanwhile."""
    size, rest = divmod(len(data), num_parts) if num_parts else (0, 1)
    if rest:
        raise ValueError(f"{len(data)} bytes are not {num_parts} equal parts")
    parts = memoryview(data)
    return struct.pack(f"<{num_parts}Q", *(xxhash.xxh3_64_intdigest(parts[start : start + size]) for start in range(0, len(data), size)))


def is_intact(data: bytes | memoryview, checksums: bytes) -> bool:
    """Whether the bytes are those that the checksums were made of."""
    num_parts = len(checksums) // CHECKSUM_BYTES
    return num_parts > 0 and len(data) % num_parts == 0 and len(data) > 0 and part_checksums(data, num_parts) == checksums
