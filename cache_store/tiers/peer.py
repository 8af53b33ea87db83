"""Stores of other nodes as a tier to bring blocks from. Pull only.

    one watching thread per peer     events -> which keys it has, a bounded set; a gap or a broken stream: anew from a snapshot
    load, on the caller's threads    Open -> ticket -> plain socket straight into the slots, or Fetch

What a peer is said to have may be gone by the time it is asked: then it is a miss, and forgotten. A peer that fails is left alone for a
while.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence

import grpc

from cache_store.checksums import CHECKSUM_BYTES, is_intact
from cache_store.keys import join_keys, split_keys
from cache_store.tiers.peer_bytes import Receiver
from cache_store.wire import SECRET_HEADER, TIER_NAMES
from protos import cache_store_pb2 as pb
from protos import cache_store_pb2_grpc

log = logging.getLogger(__name__)

Done = Callable[[int, bytes | None], None]

MAX_KEYS = 1 << 20  # known per peer
OPEN_TIMEOUT_S = 3.0
BACKOFF_S = (0.5, 15.0)  # first and longest rest after a failure
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
)


class Peer:
    """One other store. `has` is called on the store's thread, `fetch` on several, the rest on the watching one. Owner of its channel."""

    def __init__(self, address: str, secret: str) -> None:
        self.address = address
        self.is_watched = False  # its events are coming
        self.num_corrupt = self.num_failed = 0
        self._keys: dict[str, set[bytes]] = {}  # by its tier
        self._resting_until_s = 0.0
        self._rest_s = BACKOFF_S[0]
        self._metadata = ((SECRET_HEADER, secret),)
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = cache_store_pb2_grpc.PeerStoreStub(self._channel)  # type: ignore[no-untyped-call]
        self._receiver = Receiver(self._channel, address.rpartition(":")[0].strip("[]"), self._metadata)
        self._closing = threading.Event()
        self._stream: grpc.Call | None = None
        self._watcher = threading.Thread(target=self._watch, name=f"peer-watch {address}", daemon=True)
        self._watcher.start()

    def has(self, keys: Sequence[bytes]) -> int:
        """How many leading keys it is said to have; none while it rests."""
        if time.monotonic() < self._resting_until_s:
            return 0
        held = list(self._keys.values())  # a set is only added to, taken from or replaced: looking is safe from any thread
        return next((number for number, key in enumerate(keys) if not any(key in each for each in held)), len(keys))

    def fetch(self, keys: Sequence[bytes], layout: bytes, views: Sequence[memoryview], done: Done, timeout_s: float) -> None:
        """As `Source.load`."""
        deadline_s = time.monotonic() + timeout_s
        request = pb.OpenRequest(keys=join_keys(keys), layout=layout, timeout_ms=round(1000 * timeout_s))
        try:
            reply: pb.OpenResponse = self._stub.Open(request, timeout=min(OPEN_TIMEOUT_S, timeout_s), metadata=self._metadata)
            num_blocks = min(reply.num_blocks, len(keys))
            width = len(reply.checksums) * CHECKSUM_BYTES // reply.num_blocks if reply.num_blocks else 0
            checksums = array("Q", reply.checksums).tobytes()
            if num_blocks and (not width or any(len(view) != reply.block_bytes for view in views)):
                raise OSError(f"it speaks of blocks of {reply.block_bytes} bytes in {width // CHECKSUM_BYTES} parts")
            with contextlib.closing(self._receiver.receive(reply, views[:num_blocks], deadline_s)) as received:
                for position in received:
                    expected = checksums[position * width : (position + 1) * width]
                    if not is_intact(views[position], expected):
                        self.num_corrupt += 1
                        self._forget(keys[position:])
                        raise OSError(f"block {keys[position].hex()} has not the bytes that it should have")
                    done(position, expected)
            self._forget(keys[num_blocks:])
            self._rest_s = BACKOFF_S[0]
        except (grpc.RpcError, OSError) as error:
            self._failed(error)

    def close(self) -> None:
        """Ends the watching thread, and breaks off transfers."""
        self._closing.set()
        if self._stream is not None:
            self._stream.cancel()
        self._channel.close()
        self._watcher.join(OPEN_TIMEOUT_S)

    def _failed(self, error: Exception) -> None:
        self.num_failed += 1
        log.warning("peer %s: %s; leaving it alone for %.1f s", self.address, _reason(error), self._rest_s)
        self._resting_until_s = time.monotonic() + self._rest_s
        self._rest_s = min(2 * self._rest_s, BACKOFF_S[1])

    def _forget(self, keys: Sequence[bytes]) -> None:
        """It does not have them, or not intact. Should it have them again, an event or the next snapshot says so."""
        for held in self._keys.values():
            held.difference_update(keys)

    def _watch(self) -> None:
        rest_s = BACKOFF_S[0]
        while not self._closing.is_set():
            try:
                stream = self._stream = self._stub.Watch(pb.WatchRequest(), metadata=self._metadata)
                for _ in self._follow(stream):
                    rest_s = BACKOFF_S[0]
                log.info("peer %s: events were lost; asking for all of them", self.address)
                stream.cancel()
            except grpc.RpcError as error:
                if not self._closing.is_set() and self.is_watched:
                    log.info("peer %s is away: %s", self.address, _reason(error))
            except ValueError:  # the channel was closed
                return
            self.is_watched, self._keys = False, {}
            self._closing.wait(rest_s)
            rest_s = min(2 * rest_s, BACKOFF_S[1])

    def _follow(self, stream: Iterator[pb.WatchEvent]) -> Iterator[None]:
        """Applies events until one is missing. Those of the snapshot share the first number."""
        first = last = None
        for event in stream:
            first = event.sequence if first is None else first
            if last is not None and event.sequence > last + 1:
                return
            last = event.sequence
            held = self._keys.setdefault(TIER_NAMES.get(event.tier, ""), set())
            held.difference_update(split_keys(event.removed))
            held.update(split_keys(event.added)[: max(0, MAX_KEYS - len(held))])
            self.is_watched = True
            yield


class PeerTier:
    """All the peers, as one Source. `set_peers` and `find` run on the store's thread."""

    name = "peer"
    batch_bytes = 16 << 20

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._peers: dict[str, Peer] = {}

    @property
    def peers(self) -> list[Peer]:
        return list(self._peers.values())

    def set_peers(self, addresses: Sequence[str]) -> None:
        """Those named are watched from now on, others no longer."""
        gone = [self._peers.pop(address) for address in list(self._peers) if address not in addresses]
        for address in addresses:
            if address not in self._peers:
                self._peers[address] = Peer(address, self._secret)
        if gone:
            threading.Thread(target=_close_all, args=(gone,), name="peer-close", daemon=True).start()

    def find(self, keys: Sequence[bytes], layout: bytes) -> int:
        return max((peer.has(keys) for peer in self._peers.values()), default=0)

    def load(self, keys: Sequence[bytes], layout: bytes, views: Sequence[memoryview], done: Done, timeout_s: float) -> None:
        """From the peer that has the most of them."""
        peer = max(self.peers, key=lambda peer: peer.has(keys), default=None)
        if peer is not None:
            peer.fetch(keys, layout, views, done, timeout_s)

    def close(self) -> None:
        _close_all(self.peers)
        self._peers.clear()


def _close_all(peers: Sequence[Peer]) -> None:
    for peer in peers:
        peer.close()


def _reason(error: Exception) -> str:
    """What went wrong in one line; a call's error would take twenty."""
    if isinstance(error, grpc.RpcError) and hasattr(error, "code"):
        return f"{error.code().name}: {error.details()}"
    return str(error)
