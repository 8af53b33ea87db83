from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MissReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS_REASON_UNSPECIFIED: _ClassVar[MissReason]
    COLD: _ClassVar[MissReason]
    EVICTED: _ClassVar[MissReason]
    CHEAPER_TO_COMPUTE: _ClassVar[MissReason]
    LATE: _ClassVar[MissReason]
    NO_ROOM: _ClassVar[MissReason]
    LOST: _ClassVar[MissReason]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    DRAM: _ClassVar[Tier]
    DISK: _ClassVar[Tier]
    PEER: _ClassVar[Tier]

class ClaimOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLAIM_OUTCOME_UNSPECIFIED: _ClassVar[ClaimOutcome]
    CLAIM_GRANTED: _ClassVar[ClaimOutcome]
    CLAIM_STORED: _ClassVar[ClaimOutcome]
    CLAIM_ELSEWHERE: _ClassVar[ClaimOutcome]

class ReserveOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESERVE_OUTCOME_UNSPECIFIED: _ClassVar[ReserveOutcome]
    RESERVED: _ClassVar[ReserveOutcome]
    STORED: _ClassVar[ReserveOutcome]
    WRITTEN_ELSEWHERE: _ClassVar[ReserveOutcome]
    NO_SPACE: _ClassVar[ReserveOutcome]
    NO_PARENT: _ClassVar[ReserveOutcome]

class CommitOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMMIT_OUTCOME_UNSPECIFIED: _ClassVar[CommitOutcome]
    COMMITTED: _ClassVar[CommitOutcome]
    PARTIAL: _ClassVar[CommitOutcome]
    STALE: _ClassVar[CommitOutcome]
MISS_REASON_UNSPECIFIED: MissReason
COLD: MissReason
EVICTED: MissReason
CHEAPER_TO_COMPUTE: MissReason
LATE: MissReason
NO_ROOM: MissReason
LOST: MissReason
TIER_UNSPECIFIED: Tier
DRAM: Tier
DISK: Tier
PEER: Tier
CLAIM_OUTCOME_UNSPECIFIED: ClaimOutcome
CLAIM_GRANTED: ClaimOutcome
CLAIM_STORED: ClaimOutcome
CLAIM_ELSEWHERE: ClaimOutcome
RESERVE_OUTCOME_UNSPECIFIED: ReserveOutcome
RESERVED: ReserveOutcome
STORED: ReserveOutcome
WRITTEN_ELSEWHERE: ReserveOutcome
NO_SPACE: ReserveOutcome
NO_PARENT: ReserveOutcome
COMMIT_OUTCOME_UNSPECIFIED: CommitOutcome
COMMITTED: CommitOutcome
PARTIAL: CommitOutcome
STALE: CommitOutcome

class Process(_message.Message):
    __slots__ = ("pid", "start_ticks")
    PID_FIELD_NUMBER: _ClassVar[int]
    START_TICKS_FIELD_NUMBER: _ClassVar[int]
    pid: int
    start_ticks: int
    def __init__(self, pid: _Optional[int] = ..., start_ticks: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("codec", "version", "group", "block_size", "dtype", "num_parts", "part_shape", "part_bytes")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    PART_SHAPE_FIELD_NUMBER: _ClassVar[int]
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    codec: str
    version: int
    group: int
    block_size: int
    dtype: str
    num_parts: int
    part_shape: _containers.RepeatedScalarFieldContainer[int]
    part_bytes: int
    def __init__(self, codec: _Optional[str] = ..., version: _Optional[int] = ..., group: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ..., num_parts: _Optional[int] = ..., part_shape: _Optional[_Iterable[int]] = ..., part_bytes: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("layout", "processes", "label")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    processes: _containers.RepeatedCompositeFieldContainer[Process]
    label: str
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., processes: _Optional[_Iterable[_Union[Process, _Mapping]]] = ..., label: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("session_id", "epoch", "arena_path", "arena_bytes", "data_offset", "slot_bytes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ARENA_PATH_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    epoch: str
    arena_path: str
    arena_bytes: int
    data_offset: int
    slot_bytes: int
    def __init__(self, session_id: _Optional[str] = ..., epoch: _Optional[str] = ..., arena_path: _Optional[str] = ..., arena_bytes: _Optional[int] = ..., data_offset: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class DetachResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Call(_message.Message):
    __slots__ = ("number", "lookup", "claim", "acquire", "reserve", "commit", "release")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    number: int
    lookup: LookupRequest
    claim: ClaimRequest
    acquire: AcquireRequest
    reserve: ReserveRequest
    commit: CommitRequest
    release: ReleaseRequest
    def __init__(self, number: _Optional[int] = ..., lookup: _Optional[_Union[LookupRequest, _Mapping]] = ..., claim: _Optional[_Union[ClaimRequest, _Mapping]] = ..., acquire: _Optional[_Union[AcquireRequest, _Mapping]] = ..., reserve: _Optional[_Union[ReserveRequest, _Mapping]] = ..., commit: _Optional[_Union[CommitRequest, _Mapping]] = ..., release: _Optional[_Union[ReleaseRequest, _Mapping]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("number", "lookup", "claim", "acquire", "reserve", "commit", "release", "refusal")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    number: int
    lookup: LookupResponse
    claim: ClaimResponse
    acquire: AcquireResponse
    reserve: ReserveResponse
    commit: CommitResponse
    release: ReleaseResponse
    refusal: Refusal
    def __init__(self, number: _Optional[int] = ..., lookup: _Optional[_Union[LookupResponse, _Mapping]] = ..., claim: _Optional[_Union[ClaimResponse, _Mapping]] = ..., acquire: _Optional[_Union[AcquireResponse, _Mapping]] = ..., reserve: _Optional[_Union[ReserveResponse, _Mapping]] = ..., commit: _Optional[_Union[CommitResponse, _Mapping]] = ..., release: _Optional[_Union[ReleaseResponse, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("error", "details")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    error: str
    details: str
    def __init__(self, error: _Optional[str] = ..., details: _Optional[str] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("session_id", "keys", "compute_tokens_per_s", "copy_bytes_per_s", "max_pinned", "ttl_ms", "claim_ttl_ms", "min_claimed")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    COPY_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    MAX_PINNED_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    MIN_CLAIMED_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    keys: bytes
    compute_tokens_per_s: float
    copy_bytes_per_s: float
    max_pinned: int
    ttl_ms: int
    claim_ttl_ms: int
    min_claimed: int
    def __init__(self, session_id: _Optional[str] = ..., keys: _Optional[bytes] = ..., compute_tokens_per_s: _Optional[float] = ..., copy_bytes_per_s: _Optional[float] = ..., max_pinned: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., claim_ttl_ms: _Optional[int] = ..., min_claimed: _Optional[int] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("num_blocks", "tier_runs", "num_cheaper_to_compute", "miss_reason", "pinned", "claims")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIER_RUNS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHEAPER_TO_COMPUTE_FIELD_NUMBER: _ClassVar[int]
    MISS_REASON_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    tier_runs: _containers.RepeatedScalarFieldContainer[int]
    num_cheaper_to_compute: int
    miss_reason: MissReason
    pinned: AcquireResponse
    claims: _containers.RepeatedScalarFieldContainer[ClaimOutcome]
    def __init__(self, num_blocks: _Optional[int] = ..., tier_runs: _Optional[_Iterable[int]] = ..., num_cheaper_to_compute: _Optional[int] = ..., miss_reason: _Optional[_Union[MissReason, str]] = ..., pinned: _Optional[_Union[AcquireResponse, _Mapping]] = ..., claims: _Optional[_Iterable[_Union[ClaimOutcome, str]]] = ...) -> None: ...

class ClaimRequest(_message.Message):
    __slots__ = ("session_id", "keys", "ttl_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    keys: bytes
    ttl_ms: int
    def __init__(self, session_id: _Optional[str] = ..., keys: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class ClaimResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedScalarFieldContainer[ClaimOutcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[ClaimOutcome, str]]] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("session_id", "keys", "ttl_ms", "max_wait_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    keys: bytes
    ttl_ms: int
    max_wait_ms: int
    def __init__(self, session_id: _Optional[str] = ..., keys: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., max_wait_ms: _Optional[int] = ...) -> None: ...

class AcquireResponse(_message.Message):
    __slots__ = ("lease_id", "offsets", "generations", "checksums", "tier_runs", "shortfall")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    TIER_RUNS_FIELD_NUMBER: _ClassVar[int]
    SHORTFALL_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    offsets: bytes
    generations: bytes
    checksums: bytes
    tier_runs: _containers.RepeatedScalarFieldContainer[int]
    shortfall: MissReason
    def __init__(self, lease_id: _Optional[int] = ..., offsets: _Optional[bytes] = ..., generations: _Optional[bytes] = ..., checksums: _Optional[bytes] = ..., tier_runs: _Optional[_Iterable[int]] = ..., shortfall: _Optional[_Union[MissReason, str]] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("session_id", "keys", "parents", "ttl_ms", "first")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    keys: bytes
    parents: bytes
    ttl_ms: int
    first: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, session_id: _Optional[str] = ..., keys: _Optional[bytes] = ..., parents: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., first: _Optional[_Iterable[bool]] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("lease_id", "outcomes", "offsets", "generations")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    outcomes: _containers.RepeatedScalarFieldContainer[ReserveOutcome]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_id: _Optional[int] = ..., outcomes: _Optional[_Iterable[_Union[ReserveOutcome, str]]] = ..., offsets: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session_id", "lease_id", "keys", "num_parts", "parts", "checksums")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    lease_id: int
    keys: bytes
    num_parts: _containers.RepeatedScalarFieldContainer[int]
    parts: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[str] = ..., lease_id: _Optional[int] = ..., keys: _Optional[bytes] = ..., num_parts: _Optional[_Iterable[int]] = ..., parts: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedScalarFieldContainer[CommitOutcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[CommitOutcome, str]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session_id", "lease_ids")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[str] = ..., lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("num_released",)
    NUM_RELEASED_FIELD_NUMBER: _ClassVar[int]
    num_released: int
    def __init__(self, num_released: _Optional[int] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatResponse(_message.Message):
    __slots__ = ("epoch", "blocks", "total_bytes", "ready_bytes", "used_bytes", "used_slots", "free_slots", "held_slots", "quarantined_slots", "pinned_blocks", "leases", "sessions", "claims", "hit_blocks", "missed_blocks", "committed_blocks", "evicted_blocks", "killed_holders", "kept_bytes", "disk_blocks", "disk_bytes", "disk_total_bytes", "num_peers", "leased_blocks", "num_pins")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    HELD_SLOTS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISSED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KILLED_HOLDERS_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_PEERS_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PINS_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    blocks: int
    total_bytes: int
    ready_bytes: int
    used_bytes: int
    used_slots: int
    free_slots: int
    held_slots: int
    quarantined_slots: int
    pinned_blocks: int
    leases: int
    sessions: int
    claims: int
    hit_blocks: int
    missed_blocks: int
    committed_blocks: int
    evicted_blocks: int
    killed_holders: int
    kept_bytes: int
    disk_blocks: int
    disk_bytes: int
    disk_total_bytes: int
    num_peers: int
    leased_blocks: int
    num_pins: int
    def __init__(self, epoch: _Optional[str] = ..., blocks: _Optional[int] = ..., total_bytes: _Optional[int] = ..., ready_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., used_slots: _Optional[int] = ..., free_slots: _Optional[int] = ..., held_slots: _Optional[int] = ..., quarantined_slots: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., leases: _Optional[int] = ..., sessions: _Optional[int] = ..., claims: _Optional[int] = ..., hit_blocks: _Optional[int] = ..., missed_blocks: _Optional[int] = ..., committed_blocks: _Optional[int] = ..., evicted_blocks: _Optional[int] = ..., killed_holders: _Optional[int] = ..., kept_bytes: _Optional[int] = ..., disk_blocks: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., disk_total_bytes: _Optional[int] = ..., num_peers: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., num_pins: _Optional[int] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("problems",)
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, problems: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("sequence", "epoch", "tier", "added", "removed")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    epoch: str
    tier: Tier
    added: bytes
    removed: bytes
    def __init__(self, sequence: _Optional[int] = ..., epoch: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., added: _Optional[bytes] = ..., removed: _Optional[bytes] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("session_id", "owner", "keys", "ttl_ms", "max_wait_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    owner: str
    keys: bytes
    ttl_ms: int
    max_wait_ms: int
    def __init__(self, session_id: _Optional[str] = ..., owner: _Optional[str] = ..., keys: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., max_wait_ms: _Optional[int] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("pin_id", "num_blocks", "num_bytes", "over_quota")
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    OVER_QUOTA_FIELD_NUMBER: _ClassVar[int]
    pin_id: int
    num_blocks: int
    num_bytes: int
    over_quota: bool
    def __init__(self, pin_id: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., over_quota: bool = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("owner", "pin_ids")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    PIN_IDS_FIELD_NUMBER: _ClassVar[int]
    owner: str
    pin_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, owner: _Optional[str] = ..., pin_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("num_unpinned",)
    NUM_UNPINNED_FIELD_NUMBER: _ClassVar[int]
    num_unpinned: int
    def __init__(self, num_unpinned: _Optional[int] = ...) -> None: ...

class ListPinsRequest(_message.Message):
    __slots__ = ("owner",)
    OWNER_FIELD_NUMBER: _ClassVar[int]
    owner: str
    def __init__(self, owner: _Optional[str] = ...) -> None: ...

class ListPinsResponse(_message.Message):
    __slots__ = ("pins",)
    class Entry(_message.Message):
        __slots__ = ("pin_id", "owner", "num_blocks", "num_bytes", "remaining_ms")
        PIN_ID_FIELD_NUMBER: _ClassVar[int]
        OWNER_FIELD_NUMBER: _ClassVar[int]
        NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
        REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
        pin_id: int
        owner: str
        num_blocks: int
        num_bytes: int
        remaining_ms: int
        def __init__(self, pin_id: _Optional[int] = ..., owner: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., remaining_ms: _Optional[int] = ...) -> None: ...
    PINS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[ListPinsResponse.Entry]
    def __init__(self, pins: _Optional[_Iterable[_Union[ListPinsResponse.Entry, _Mapping]]] = ...) -> None: ...

class SetPeersRequest(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class SetPeersResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("keys", "layout", "timeout_ms")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    layout: bytes
    timeout_ms: int
    def __init__(self, keys: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("num_blocks", "block_bytes", "checksums", "ticket", "port")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    block_bytes: int
    checksums: _containers.RepeatedScalarFieldContainer[int]
    ticket: bytes
    port: int
    def __init__(self, num_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., checksums: _Optional[_Iterable[int]] = ..., ticket: _Optional[bytes] = ..., port: _Optional[int] = ...) -> None: ...
