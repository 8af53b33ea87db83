"""Block identity: which computed keys and values may stand in for which tokens.

A *layout* says how a stored block's bytes are arranged and so picks the slot size. A *root* names everything besides the tokens that the
bytes depend on. A *block key* chains a block's tokens onto its parent's key, so equal keys mean equal prefixes under equal weights.
Keys are BLAKE2b-128: a collision would serve one tenant's prefix to another, so nothing faster will do.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

KEY_BYTES = 16
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

BlockKey = NewType("BlockKey", bytes)

_BLOCK_PURPOSE = b"block".ljust(16, b"\0")
_PARENT_LENGTH = struct.pack("<Q", KEY_BYTES)


@dataclass(frozen=True, slots=True)
class Layout:
    """The bytes of one stored block: `num_parts` parts of `part_shape`, one after the other.

    A part is the unit that one rank writes and hashes: a KV head (gqa, shape [layers, 2, block_size, head_dim]) or a layer (mla, shape
    [block_size, kv_lora_rank + rope_dim]).
    """

    codec: str  # "gqa" or "mla"
    group: int  # layer group; 0 until models with several kinds of layers
    block_size: int  # tokens
    dtype: str  # key of DTYPE_BYTES
    num_parts: int
    part_shape: tuple[int, ...]
    version: int = 1

    @property
    def part_bytes(self) -> int:
        return math.prod(self.part_shape) * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.num_parts * self.part_bytes

    def digest(self) -> bytes:
        """16 bytes that differ whenever any field does."""
        fields = (self.codec, self.group, self.block_size, self.dtype, self.num_parts, *self.part_shape, self.version)
        return hash_fields("layout", *(str(field).encode() for field in fields))


def hash_fields(purpose: str, *fields: bytes) -> bytes:
    """BLAKE2b-128 of the fields, each preceded by its length, so that no two lists of fields read alike."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=purpose.encode().ljust(16, b"\0"))
    for field in fields:
        digest.update(struct.pack("<Q", len(field)))
        digest.update(field)
    return digest.digest()


def root_key(
    *,
    weights_digest: bytes,
    model_config: bytes,
    compute_dtype: str,
    weight_quantisation: str,
    adapter: str,
    layout: Layout,
    numerics: str,
) -> BlockKey:
    """The root of every prefix computed by one engine configuration, before tenants and salts narrow it."""
    return BlockKey(
        hash_fields(
            "root",
            weights_digest,
            model_config,
            compute_dtype.encode(),
            weight_quantisation.encode(),
            adapter.encode(),
            layout.digest(),
            numerics.encode(),
        )
    )


def salted_root(root: BlockKey, tenant: str, cache_salt: str) -> BlockKey:
    """Narrows a root to one tenant and the salt of its request."""
    return BlockKey(hash_fields("salt", root, tenant.encode(), cache_salt.encode()))


def block_key(parent: BlockKey, token_ids: Sequence[int], extra: bytes = b"") -> BlockKey:
    """The key of the block that holds `token_ids` right after the prefix that `parent` names.

    `extra` is whatever besides the token ids decided the block's content (for instance an image's digest).
    """
    return BlockKey(hash_fields("block", parent, array("I", token_ids).tobytes(), extra))


def chain_keys(parent: BlockKey, token_ids: Sequence[int], block_size: int) -> list[BlockKey]:
    """Keys of the full blocks of `token_ids`, which follow directly on `parent`; a partial last block has none.

    The same as `block_key` for one after the other, in less than half the time: a long prompt's keys are hashed before its first step.
    """
    column = array("I", token_ids).tobytes()
    num_bytes = 4 * block_size
    between, behind = struct.pack("<Q", num_bytes), struct.pack("<Q", 0)
    blake2b, keys, key = hashlib.blake2b, [], bytes(parent)
    for start in range(0, len(column) - num_bytes + 1, num_bytes):
        fields = _PARENT_LENGTH + key + between + column[start : start + num_bytes] + behind
        key = blake2b(fields, digest_size=KEY_BYTES, person=_BLOCK_PURPOSE).digest()
        keys.append(BlockKey(key))
    return keys


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as one column of a message."""
    return b"".join(keys)


def split_keys(column: bytes) -> list[BlockKey]:
    """The inverse of `join_keys`. ValueError when the column is not a whole number of keys."""
    if len(column) % KEY_BYTES:
        raise ValueError(f"a column of keys must be a multiple of {KEY_BYTES} bytes, not {len(column)}")
    return [BlockKey(column[start : start + KEY_BYTES]) for start in range(0, len(column), KEY_BYTES)]
