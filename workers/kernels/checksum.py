"""xxh3-64 of parts of pages where they lie, on the GPU: a processor's cores could not keep up with the link to it.

The specification: github.com/Cyan4973/xxHash, doc/xxhash_spec.md, XXH3 for inputs over 240 bytes, seed 0. The eight accumulators of a
part are eight lanes here; an 8-byte word of the input is multiplied into its own lane and added to its neighbour's. In the end pairs of
lanes are multiplied to 128 bits, whose halves are joined.

N parts
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIMES_32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIMES_64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_START = (_PRIMES_32[2], *_PRIMES_64[:4], _PRIMES_32[1], _PRIMES_64[4], _PRIMES_32[0])
_STRIPE_WORDS = 8
_LAST_KEY, _MERGE_KEY = 192 - 64 - 7, 11  # bytes into the secret
_MIN_BYTES = 1024
_PARTS = 4  # of one program
_INLINE_WORDS = 8192  # 64 KiB of pageable memory go to the device among its commands; more, or pinned memory, by DMA behind that of pages


@triton.jit
def _products(word, neighbour, key):
    """What a stripe adds to the accumulators."""
    mixed = word ^ key
    return neighbour + (mixed & 0xFFFFFFFF) * (mixed >> 32)


@triton.jit(do_not_specialize=["first_part", "num_parts"])
def _hash(words_ptr, starts_ptr, keys_ptr, out_ptr, first_part, num_parts, num_blocks, num_stripes, last_word, PARTS: tl.constexpr):
    part = first_part + tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    inside = (part < num_parts)[:, None]
    lane, stripe = tl.arange(0, 8), tl.arange(0, 16)
    start = words_ptr + tl.load(starts_ptr + part, mask=part < num_parts, other=0)[:, None]
    own, other = start + lane[None, :], start + (lane ^ 1)[None, :]
    acc = tl.load(keys_ptr + 32 + lane)[None, :].to(tl.uint64, bitcast=True) + tl.zeros((PARTS, 8), tl.uint64)
    # a block at once, [PARTS, 16 stripes, 8 lanes]: between two scrambles the order of sums is free
    in_block = stripe[None, :, None] * 8
    own_block, other_block, inside_block = own[:, None, :] + in_block, other[:, None, :] + in_block, inside[:, :, None]
    keys = tl.load(keys_ptr + stripe[:, None] + lane[None, :])[None, :, :].to(tl.uint64, bitcast=True)
    scramble = tl.load(keys_ptr + 16 + lane)[None, :].to(tl.uint64, bitcast=True)
    for block in tl.range(num_blocks, num_stages=1):  # more stages pass through shared memory, and are slower
        word = tl.load(own_block + block * 128, mask=inside_block, other=0).to(tl.uint64, bitcast=True)
        neighbour = tl.load(other_block + block * 128, mask=inside_block, other=0).to(tl.uint64, bitcast=True)
        acc += tl.sum(_products(word, neighbour, keys), 1)
        acc = (acc ^ (acc >> 47) ^ scramble) * 0x9E3779B1
    for rest in range(num_stripes):
        word = tl.load(own + num_blocks * 128 + rest * 8, mask=inside, other=0).to(tl.uint64, bitcast=True)
        neighbour = tl.load(other + num_blocks * 128 + rest * 8, mask=inside, other=0).to(tl.uint64, bitcast=True)
        acc += _products(word, neighbour, tl.load(keys_ptr + rest + lane)[None, :].to(tl.uint64, bitcast=True))
    word = tl.load(own + last_word, mask=inside, other=0).to(tl.uint64, bitcast=True)
    neighbour = tl.load(other + last_word, mask=inside, other=0).to(tl.uint64, bitcast=True)
    acc += _products(word, neighbour, tl.load(keys_ptr + 24 + lane)[None, :].to(tl.uint64, bitcast=True))
    acc ^= tl.load(keys_ptr + 40 + lane)[None, :].to(tl.uint64, bitcast=True)
    low, high = tl.split(acc.reshape(PARTS, 4, 2))
    num_bytes = (last_word + 8).to(tl.uint64) * 8
    total = tl.sum((low * high) ^ tl.umulhi(low, high), 1) + num_bytes * 0x9E3779B185EBCA87
    total = (total ^ (total >> 37)) * 0x165667919E3779F9
    tl.store(out_ptr + part, (total ^ (total >> 32)).to(tl.int64, bitcast=True), mask=part < num_parts)


def can_hash(part_bytes: int) -> bool:
    return part_bytes >= _MIN_BYTES and part_bytes % 8 == 0


class PartHasher:
    """For up to `max_parts` parts of `part_bytes` in `data` (uint8, contiguous, 8-byte aligned), one lot after the other. Its memory is
    allocated once: pinning some would wait for all that the device has to do."""

    def __init__(self, data: torch.Tensor, part_bytes: int, max_parts: int) -> None:
        self._words = data.view(torch.int64)
        self._part_bytes = part_bytes
        last, merge = (_SECRET[first : first + 64] for first in (_LAST_KEY, _MERGE_KEY))
        start = np.array(_START, np.uint64).tobytes()
        keys = np.frombuffer(_SECRET + last + start + merge, np.int64).copy()  # 24 words of the secret, then 8 each
        self._keys = torch.from_numpy(keys).to(data.device)
        self._starts, self._hashes = (torch.empty(max_parts, dtype=torch.int64, device=data.device) for _ in range(2))
        self._host_hashes = torch.empty(max_parts, dtype=torch.int64, pin_memory=data.is_cuda)

    def put(self, offsets_N: np.ndarray) -> None:
        """Queues on the current stream where the next lot's parts begin, in bytes."""
        for piece, target in zip(torch.from_numpy(offsets_N // 8).split(_INLINE_WORDS), self._starts.split(_INLINE_WORDS), strict=False):
            target[: len(piece)].copy_(piece, non_blocking=True)

    def start(self, first: int, stop: int) -> None:
        """Queues the hashing of the lot's parts [first, stop) on the current stream."""
        size = self._part_bytes
        num_blocks = (size - 1) // 1024
        _hash[(triton.cdiv(stop - first, _PARTS),)](
            self._words, self._starts, self._keys, self._hashes, first, stop, num_blocks, (size - 1 - 1024 * num_blocks) // 64,
            size // 8 - _STRIPE_WORDS, PARTS=_PARTS, num_warps=1,
        )  # fmt: skip
        self._host_hashes[first:stop].copy_(self._hashes[first:stop], non_blocking=True)

    def finish(self, count: int) -> np.ndarray:
        """The hashes of the lot's `count` parts, uint64, once the streams have come so far."""
        return self._host_hashes[:count].numpy().view(np.uint64)
