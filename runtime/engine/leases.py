"""The store's slots that this engine holds: what was granted and not yet given back."""

from __future__ import annotations

from runtime.engine.store_port import Release, StorePort


class Leases:
    """Releases in batches, again and again until the store confirms or is lost: then it has taken everything back itself."""

    def __init__(self, port: StorePort) -> None:
        self._port = port
        self._slots: dict[int, int] = {}  # lease -> slots
        self._to_release: list[int] = []
        self._releasing: dict[int, list[int]] = {}  # ticket -> leases

    @property
    def num_slots(self) -> int:
        return sum(self._slots.values())

    def holds(self, lease_id: int) -> bool:
        """Whether the store has not yet confirmed the end of the lease."""
        return lease_id in self._slots

    def add(self, lease_id: int, num_slots: int) -> None:
        self._slots[lease_id] = num_slots

    def release(self, lease_id: int) -> None:
        """No copy of this engine touches the lease's slots any more."""
        if lease_id in self._slots:
            self._to_release.append(lease_id)

    def flush(self) -> None:
        if self._to_release:
            ticket = self._port.ask(Release(self._to_release))
            if ticket is not None:
                self._releasing[ticket] = self._to_release
                self._to_release = []

    def answered(self, ticket: int) -> bool:
        """True when the answer was to a release. A failed one is followed by the loss of the store."""
        lease_ids = self._releasing.pop(ticket, None)
        for lease_id in lease_ids or ():
            self._slots.pop(lease_id, None)
        return lease_ids is not None

    def lost(self) -> None:
        self._slots.clear()
        self._to_release.clear()
        self._releasing.clear()
