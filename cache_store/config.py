"""Settings of one node's cache store."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from cache_store.eviction import DEFAULT_EVICTION, EVICTION

GRANULE_BYTES = 4096  # slots begin at multiples of this, and each granule has one generation word
MAX_UNIX_PATH_BYTES = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """ValueError when a value makes no sense; the message starts with the field's name."""

    memory_bytes: int  # of slots; the generation words come on top (1/512 of it)
    secret: str = field(repr=False)  # every call must carry it
    address: str = ""  # "unix:/path" or "host:port" (port 0: any); "": a socket in `directory`
    directory: str = "/dev/shm"
    extent_bytes: int = 64 << 20  # memory is allocated, and given to a slot size, in pieces of this
    eviction: str = DEFAULT_EVICTION  # key of cache_store.eviction.EVICTION
    max_ttl_s: float = 600.0  # longer leases are shortened to this
    kill_grace_s: float = 1.0  # between a write lease's deadline and the end of its holders
    max_sessions: int = 256
    max_leases: int = 4096  # per session; beyond: acquire finds nothing, reserve has no space
    max_claims: int = 1 << 20  # beyond, claims are granted without being recorded
    max_keys: int = 1 << 16  # per call
    max_watchers: int = 64
    watch_queue_events: int = 1024  # per watcher; a slower one loses events
    max_pins: int = 4096
    max_pin_ttl_s: float = 86400.0  # longer ones are shortened to this
    max_pinned_share: float = 0.5  # of the arena, by all pins together
    max_pinned_share_per_owner: float = 0.25
    peer_address: str = ""  # HOST:PORT that stores of other nodes pull from (port 0: any); "": nothing is lent
    peers: tuple[str, ...] = ()  # HOST:PORT of those to pull from, until SetPeers names others
    metrics_address: str = ""  # HOST:PORT of an HTTP server with Prometheus metrics; "": none, the Metrics rpc has them too
    load_timeout_s: float = 10.0  # of one batch of blocks from disk or a peer
    disk_bytes: int = 0  # of the disk tier; 0: none
    disk_directory: str = ""  # where it lies; one store at a time uses it

    def __post_init__(self) -> None:
        if not self.secret:
            raise ValueError("secret: must not be empty")
        if self.extent_bytes < GRANULE_BYTES or self.extent_bytes % GRANULE_BYTES:
            raise ValueError(f"extent_bytes: must be a positive multiple of {GRANULE_BYTES}, not {self.extent_bytes}")
        if self.memory_bytes < GRANULE_BYTES:
            raise ValueError(f"memory_bytes: must be at least {GRANULE_BYTES}, not {self.memory_bytes}")
        if self.eviction not in EVICTION:
            raise ValueError(f"eviction: {self.eviction!r} is none of {', '.join(EVICTION)}")
        if self.max_ttl_s <= 0 or self.kill_grace_s < 0:
            raise ValueError("max_ttl_s, kill_grace_s: must be positive")
        if min(self.max_sessions, self.max_leases, self.max_claims, self.max_keys, self.max_watchers, self.watch_queue_events) < 1:
            raise ValueError("max_sessions, max_leases, max_claims, max_keys, max_watchers, watch_queue_events: must be at least 1")
        for name in filter(None, (self.peer_address, self.metrics_address, *self.peers)):
            host, _, port = name.rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError(f"peer_address, peers, metrics_address: must be HOST:PORT, not {name!r}")
        if not 0 <= self.max_pinned_share_per_owner <= self.max_pinned_share < 1:
            raise ValueError("max_pinned_share, max_pinned_share_per_owner: must be shares of the arena, in that order, below 1")
        if self.disk_bytes and not self.disk_directory:
            raise ValueError("disk_directory: the disk tier needs one")
        if self.disk_bytes < 0 or 0 < self.disk_bytes < GRANULE_BYTES:
            raise ValueError(f"disk_bytes: must be 0 or at least {GRANULE_BYTES}, not {self.disk_bytes}")
        path = unix_path(self.address)
        if path is not None and len(path.encode()) > MAX_UNIX_PATH_BYTES:
            raise ValueError(f"address: a unix socket's path holds at most {MAX_UNIX_PATH_BYTES} bytes, not {path!r}")

    def to_json(self) -> str:
        """One line. It contains the secret: for a pipe, never for a command line or a log."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> StoreConfig:
        """The inverse of `to_json`. ValueError when it is not."""
        fields = json.loads(line)
        if not isinstance(fields, dict) or fields.keys() - {each.name for each in dataclasses.fields(cls)}:
            raise ValueError("not a store's settings")
        return cls(**{**fields, "peers": tuple(fields.get("peers", ()))})


def unix_path(address: str) -> str | None:
    """The path of a "unix:" address, None for any other."""
    return address.removeprefix("unix:") if address.startswith("unix:") else None
