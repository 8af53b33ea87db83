"""How the store's words and the messages of protos/cache_store.proto correspond. Used by both ends."""

from __future__ import annotations

import grpc

from cache_store.accesses import MissReason
from cache_store.errors import ArenaTooSmall, LayoutMismatch, StoreError, StoreRefused, StoreUnavailable
from cache_store.keys import Layout
from cache_store.outcomes import ClaimOutcome, CommitOutcome, ReserveOutcome
from protos import cache_store_pb2 as pb

SECRET_HEADER = "x-mobula-secret"
ERROR_HEADER = "x-mobula-error"  # name of the error class, in the trailing metadata
MAX_MESSAGE_BYTES = 64 << 20  # 8192 blocks of 61 parts are 4 MB of checksums

CLAIM = {
    ClaimOutcome.GRANTED: pb.CLAIM_GRANTED,
    ClaimOutcome.STORED: pb.CLAIM_STORED,
    ClaimOutcome.ELSEWHERE: pb.CLAIM_ELSEWHERE,
}
RESERVE = {
    ReserveOutcome.RESERVED: pb.RESERVED,
    ReserveOutcome.STORED: pb.STORED,
    ReserveOutcome.WRITTEN_ELSEWHERE: pb.WRITTEN_ELSEWHERE,
    ReserveOutcome.NO_SPACE: pb.NO_SPACE,
    ReserveOutcome.NO_PARENT: pb.NO_PARENT,
}
COMMIT = {
    CommitOutcome.COMMITTED: pb.COMMITTED,
    CommitOutcome.PARTIAL: pb.PARTIAL,
    CommitOutcome.STALE: pb.STALE,
}
MISS = {
    MissReason.COLD: pb.COLD,
    MissReason.EVICTED: pb.EVICTED,
    MissReason.CHEAPER_TO_COMPUTE: pb.CHEAPER_TO_COMPUTE,
    MissReason.LATE: pb.LATE,
    MissReason.NO_SPACE: pb.NO_ROOM,
    MissReason.LOST: pb.LOST,
}
TIER = {"dram": pb.DRAM, "disk": pb.DISK, "peer": pb.PEER}

TIER_NAMES = {int(number): name for name, number in TIER.items()}

STATUS: dict[type[Exception], grpc.StatusCode] = {
    StoreUnavailable: grpc.StatusCode.NOT_FOUND,  # the session is not known here
    StoreRefused: grpc.StatusCode.FAILED_PRECONDITION,
    ArenaTooSmall: grpc.StatusCode.OUT_OF_RANGE,
    LayoutMismatch: grpc.StatusCode.INVALID_ARGUMENT,
}
ERRORS: dict[str, type[StoreError]] = {cls.__name__: cls for cls in (StoreUnavailable, StoreRefused, ArenaTooSmall, LayoutMismatch)}


def layout_to_message(layout: Layout) -> pb.Layout:
    return pb.Layout(
        codec=layout.codec,
        version=layout.version,
        group=layout.group,
        block_size=layout.block_size,
        dtype=layout.dtype,
        num_parts=layout.num_parts,
        part_shape=layout.part_shape,
        part_bytes=layout.part_bytes,
    )


def layout_from_message(message: pb.Layout) -> Layout:
    """LayoutMismatch when the sender computes another size for a part than we do."""
    layout = Layout(
        codec=message.codec,
        group=message.group,
        block_size=message.block_size,
        dtype=message.dtype,
        num_parts=message.num_parts,
        part_shape=tuple(message.part_shape),
        version=message.version,
    )
    try:
        part_bytes = layout.part_bytes
    except KeyError as error:
        raise LayoutMismatch(f"layout.dtype: {layout.dtype!r} is not known") from error
    if part_bytes != message.part_bytes:
        raise LayoutMismatch(f"layout.part_bytes: {message.part_bytes}, but {layout.part_shape} of {layout.dtype} are {part_bytes}")
    return layout
