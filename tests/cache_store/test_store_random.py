"""Thousands of random calls, deaths and restarts, each answered as a model answers that recomputes everything from a list of blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from cache_store.errors import StoreUnavailable
from cache_store.keys import BlockKey
from tests.cache_store.conftest import LAYOUT, ROOT, Kit, key

NUM_SLOTS = 12
NUM_PARTS = LAYOUT.num_parts
GRACE_S = 1.0


@dataclass(eq=False)
class ModelBlock:
    key: BlockKey
    parent: ModelBlock | None
    session: str
    lease: int
    state: str = "writing"  # stored, orphaned, quarantined
    parts: dict[int, int] = field(default_factory=dict)


@dataclass(eq=False)
class ModelSession:
    alive: set[int]
    reads: dict[int, tuple[float, list[ModelBlock]]] = field(default_factory=dict)
    writes: dict[int, float] = field(default_factory=dict)
    ended: bool = False


class Model:
    """`blocks` has one entry per slot in use; stored ones are in the order of their last access."""

    def __init__(self) -> None:
        self.blocks: list[ModelBlock] = []
        self.sessions: dict[str, ModelSession] = {}
        self.claims: dict[BlockKey, tuple[str, float]] = {}

    def find(self, key: BlockKey | None) -> ModelBlock | None:
        return next((block for block in self.blocks if block.key == key and block.state in ("writing", "stored")), None)

    def leading(self, keys: list[BlockKey]) -> list[ModelBlock]:
        found = []
        for each in keys:
            block = self.find(each)
            if block is None or block.state != "stored":
                break
            found.append(block)
        return found

    def touch(self, block: ModelBlock) -> None:
        self.blocks.remove(block)
        self.blocks.append(block)

    def pins(self, block: ModelBlock) -> int:
        return sum(block in blocks for session in self.sessions.values() for _, blocks in session.reads.values())

    def acquire(self, session: str, keys: list[BlockKey], lease: int, deadline_s: float) -> int:
        blocks = self.leading(keys)
        for block in reversed(blocks):
            self.touch(block)
        if blocks:
            self.sessions[session].reads[lease] = (deadline_s, blocks)
        return len(blocks)

    def reserve(
        self, session: str, keys: list[BlockKey], parents: list[BlockKey], first: list[bool], lease: int, deadline_s: float
    ) -> list[str]:
        outcomes = []
        for each, parent_key, is_first in zip(keys, parents, first, strict=True):
            outcomes.append(self._reserve(session, each, None if is_first else parent_key, lease))
        if "reserved" in outcomes:
            self.sessions[session].writes[lease] = deadline_s + GRACE_S
        return outcomes

    def _reserve(self, session: str, key: BlockKey, parent_key: BlockKey | None, lease: int) -> str:
        block = self.find(key)
        if block is not None:
            if block.state == "stored":
                self.touch(block)
                return "stored"
            return "written_elsewhere"
        parent = self.find(parent_key)
        if parent_key is not None and (parent is None or (parent.state == "writing" and parent.session != session)):
            return "no_parent"
        if len(self.blocks) == NUM_SLOTS:
            parents = [block.parent for block in self.blocks] + [parent]
            victim = next((b for b in self.blocks if b.state == "stored" and b not in parents and not self.pins(b)), None)
            if victim is None:
                return "no_space"
            self.blocks.remove(victim)
        self.blocks.append(ModelBlock(key, parent, session, lease))
        return "reserved"

    def commit(self, lease: int, blocks: list[tuple[BlockKey, list[int], list[int]]]) -> list[str]:
        mine = [next((b for b in self.blocks if b.lease == lease and b.key == each and b.state != "stored"), None) for each, _, _ in blocks]
        for block, (_, parts, checksums) in zip(mine, blocks, strict=True):
            if block is not None and block.state == "writing":
                block.parts.update(zip(parts, checksums, strict=True))
                self._publish()
        self._forget_empty_leases()
        return ["stale" if b is None or b.state == "orphaned" else "committed" if b.state == "stored" else "partial" for b in mine]

    def _publish(self) -> None:
        """Everything that is complete and has a visible parent, until nothing changes."""
        ready = [
            b
            for b in self.blocks
            if b.state == "writing" and len(b.parts) == NUM_PARTS and (b.parent is None or b.parent.state == "stored")
        ]
        for block in ready:
            block.state = "stored"
            self.touch(block)
            self.claims.pop(block.key, None)
        if ready:
            self._publish()

    def _forget_empty_leases(self) -> None:
        held = {block.lease for block in self.blocks if block.state in ("writing", "orphaned")}
        for session in self.sessions.values():
            session.writes = {lease: deadline_s for lease, deadline_s in session.writes.items() if lease in held}

    def abandon(self, block: ModelBlock, state: str) -> None:
        for child in [child for child in self.blocks if child.parent is block]:
            self.abandon(child, "orphaned")
        block.parent = None
        block.state = state

    def end_write(self, lease: int, state: str) -> None:
        for block in [b for b in self.blocks if b.lease == lease and b.state in ("writing", "orphaned")]:
            self.abandon(block, state)
            if state == "gone":
                self.blocks.remove(block)

    def release(self, session: str, lease: int) -> int:
        owner = self.sessions[session]
        if owner.reads.pop(lease, None):
            return 1
        if owner.writes.pop(lease, None) is None:
            return 0
        self.end_write(lease, "gone")
        return 1

    def claim(self, session: str, key: BlockKey, deadline_s: float) -> str:
        block = self.find(key)
        if block is not None and block.state == "stored":
            return "stored"
        claimed = self.claims.get(key)
        if (block is not None and block.session != session) or (claimed and claimed[0] != session):
            return "elsewhere"
        self.claims[key] = (session, deadline_s)
        return "granted"

    def end(self, name: str) -> None:
        session = self.sessions[name]
        session.ended = True
        session.reads.clear()
        self.claims = {each: claim for each, claim in self.claims.items() if claim[0] != name}
        for lease in session.writes:
            self.end_write(lease, "quarantined")
        session.writes.clear()
        self.bury(name)

    def bury(self, name: str) -> None:
        mine = [block for block in self.blocks if block.session == name and block.state == "quarantined"]
        if not self.sessions[name].alive or not mine:
            self.blocks = [block for block in self.blocks if block not in mine]

    def die(self, pid: int) -> None:
        for name, session in self.sessions.items():
            if pid in session.alive:
                session.alive.discard(pid)
                if not session.alive:
                    self.bury(name) if session.ended else self.end(name)

    def advance(self, now_s: float) -> set[int]:
        """Pids that are killed. Whatever is due, earliest first; what falls together commutes."""
        killed: set[int] = set()
        self.claims = {each: claim for each, claim in self.claims.items() if claim[1] > now_s}
        for name, session in self.sessions.items():
            session.reads = {lease: read for lease, read in session.reads.items() if read[0] > now_s}
            if any(deadline_s <= now_s for deadline_s in session.writes.values()):
                killed |= session.alive
                self.end(name)
        return killed

    def stat(self) -> tuple[int, ...]:
        states = [block.state for block in self.blocks]
        opened = [session for session in self.sessions.values() if not session.ended]
        return (
            states.count("stored"),
            len(states) - states.count("stored"),
            states.count("quarantined"),
            sum(block.state == "stored" and self.pins(block) > 0 for block in self.blocks),
            sum(len(session.reads) + len(session.writes) for session in opened),
            len(opened),
            len(self.claims),
        )


class Run:
    """One random run: the same calls to the store and to the model."""

    def __init__(self, kit: Kit, seed: int) -> None:
        self.rng = random.Random(seed)
        self.kit = kit
        self.pids: dict[str, list[int]] = {}
        self.leases: list[tuple[str, int]] = []
        self.chains = [[key(f"{name}/{depth}") for depth in range(5)] for name in range(4)]
        self.restart()

    def restart(self) -> None:
        self.kit.make(num_slots=NUM_SLOTS, extent_slots=self.rng.choice([3, 5, 12]))
        self.model = Model()
        self.leases.clear()
        self.pids.clear()

    def any_session(self) -> str | None:
        return self.rng.choice(list(self.pids)) if self.pids else None

    def some_keys(self) -> tuple[list[BlockKey], list[BlockKey], list[bool]]:
        """Keys with parents: a stretch of a chain, sometimes with a branch."""
        keys = self.rng.choice(self.chains)
        start = self.rng.choice([0, 0, 0, 1, 2])
        chosen = keys[start : self.rng.randrange(start + 1, len(keys) + 1)]
        parents = [keys[start - 1] if start else ROOT, *chosen[:-1]]
        if self.rng.random() < 0.3:
            parents.append(self.rng.choice(chosen))
            chosen = [*chosen, key(f"branch of {parents[-1].hex()}")]
        return chosen, parents, [parent == ROOT for parent in parents]

    def attach(self) -> None:
        if len(self.pids) < 4:
            session, pids = self.kit.attach(num_processes=self.rng.choice([1, 2]))
            self.pids[session] = pids
            self.model.sessions[session] = ModelSession(set(pids))

    def acquire(self, session: str, keys: list[BlockKey], ttl_s: float) -> None:
        assert self.kit.store.lookup(session, keys) == len(self.model.leading(keys))
        lease, blocks = self.kit.store.acquire(session, keys, ttl_s)
        assert len(blocks) == self.model.acquire(session, keys, lease, self.kit.clock.now_s + ttl_s)
        for block, modelled in zip(blocks, self.model.leading(keys), strict=True):
            assert dict(enumerate(block.checksums)) == modelled.parts
        if lease:
            self.leases.append((session, lease))

    def reserve(self, session: str, ttl_s: float) -> None:
        keys, parents, first = self.some_keys()
        placed = self.kit.store.reserve(session, keys, parents, ttl_s, first)
        expected = self.model.reserve(session, keys, parents, first, placed.lease_id, self.kit.clock.now_s + ttl_s)
        assert placed.outcomes == expected
        if placed.lease_id:
            self.leases.append((session, placed.lease_id))
            if self.rng.random() < 0.7:
                self.commit(session, placed.lease_id)

    def commit(self, session: str, lease: int) -> None:
        held = [block.key for block in self.model.blocks if block.lease == lease]
        blocks = []
        for each in self.rng.sample(held, len(held)) + [key("nobody's")]:
            parts = self.rng.choice([[0], [1], [0, 1], [0, 1], [0, 1]])
            blocks.append((each, parts, [self.rng.getrandbits(64) for _ in parts]))
        expected = self.model.commit(lease, blocks)
        assert self.kit.store.commit(session, lease, blocks) == expected

    def release(self, session: str, lease: int) -> None:
        assert self.kit.store.release(session, [lease]) == self.model.release(session, lease)

    def claim(self, session: str, ttl_s: float) -> None:
        keys, _, _ = self.some_keys()
        expected = [self.model.claim(session, each, self.kit.clock.now_s + ttl_s) for each in keys]
        assert self.kit.store.claim(session, keys, ttl_s) == expected

    def kill(self) -> None:
        alive = sorted({pid for session in self.model.sessions.values() for pid in session.alive})
        if alive:
            self.die(self.rng.choice(alive))

    def die(self, pid: int) -> None:
        self.kit.watcher.die(pid)
        self.model.die(pid)

    def advance(self) -> None:
        self.kit.watcher.killed.clear()
        self.kit.advance(self.rng.choice([0.5, 2.0, 5.0]))
        killed = self.model.advance(self.kit.clock.now_s)
        assert set(self.kit.watcher.killed) == killed
        for pid in killed:
            if self.rng.random() < 0.5:
                self.die(pid)  # else some time later

    def step(self) -> None:
        session = self.any_session()
        ttl_s = self.rng.choice([1.0, 4.0, 30.0])
        lease = self.rng.choice(self.leases) if self.leases else None
        action = self.rng.choices(
            ["attach", "acquire", "reserve", "commit", "release", "claim", "detach", "die", "advance", "restart"],
            [4, 20, 25, 12, 15, 6, 1, 1, 8, 0.1],
        )[0]
        if action == "attach" or session is None:
            self.attach()
        elif action == "acquire":
            self.acquire(session, self.rng.choice(self.chains), ttl_s)
        elif action == "reserve":
            self.reserve(session, ttl_s)
        elif action == "claim":
            self.claim(session, ttl_s)
        elif action in ("commit", "release") and lease:
            getattr(self, action)(*lease)
        elif action == "detach":
            self.kit.store.detach(session)
            self.model.end(session)
        elif action == "die":
            self.kill()
        elif action == "advance":
            self.advance()
        elif action == "restart":
            self.restart()

    def compare(self) -> None:
        for session in [name for name in self.pids if self.model.sessions[name].ended]:
            with pytest.raises(StoreUnavailable):
                self.kit.store.lookup(session, [])
            del self.pids[session]
        self.leases = [(session, lease) for session, lease in self.leases if session in self.pids][-30:]
        stat = self.kit.store.stat()
        found = (
            stat.blocks, stat.held_slots, stat.quarantined_slots, stat.pinned_blocks, stat.leases, stat.sessions, stat.claims
        )  # fmt: skip
        assert found == self.model.stat()
        assert self.kit.store.check() == []


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_are_answered_as_by_the_model(kit: Kit, seed: int) -> None:
    run = Run(kit, seed)
    for number in range(1500):
        try:
            run.step()
            run.compare()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {number}: {error}") from error
