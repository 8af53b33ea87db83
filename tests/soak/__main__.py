"""`make soak`: requests without a pause, while engines, ranks, peers and stores are killed and stopped at random.

Two nodes with a store each (the first with a disk, each the other's peer) and three replicas; tokens follow from every byte of the pages,
so one wrong byte anywhere is a wrong token. Ends with a table; exit code 1 for a wrong token, a request without an answer, or anything
left behind.
usage: python -m tests.soak [--seconds N] [--seed N]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cache_store.client import StoreClient
from cache_store.errors import StoreError
from tests.soak.chain_runner import VOCAB_SIZE, expected_tokens
from tests.soak.replica import SECRET
from tests.soak.world import MARK, Replica, World, kill, marked_processes, wait_for

OPEN_PER_REPLICA = 3
FAULT_EVERY_S = (1.0, 4.0)
FAULTS = {"engine killed": 4, "rank killed": 2, "store killed": 3, "store stopped for a second": 2, "engine stopped for a second": 1}
PEERS_EVERY_S = 2.0
QUIET_TIMEOUT_S = 60.0
TIERS = ("pages", "dram", "disk", "peer")


class Soak:
    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()  # prompt tokens by where they came from
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.answers: list[dict[str, object]] = []  # to questions about statistics
        self._families = [[self.rng.randrange(VOCAB_SIZE) for _ in range(self.rng.randrange(200, 600))] for _ in range(12)]
        self._expected: dict[str, list[int]] = {}
        self._orphans: list[dict[str, object]] = []  # requests whose replica died

    def run(self, seconds: float, progress: Progress) -> None:
        deadline_s = time.monotonic() + seconds
        task = progress.add_task("", total=seconds)
        fault_s = time.monotonic() + 3.0
        peers_s = 0.0
        while (now_s := time.monotonic()) < deadline_s:
            self._submit()
            self._take(0.05)
            said = f"{self.counts['answered']:,} answered, {self.counts['wrong']} wrong, {self.faults.total()} kills and stops"
            progress.update(task, completed=seconds - (deadline_s - now_s), description=said)
            if now_s > fault_s:
                fault_s = now_s + self.rng.uniform(*FAULT_EVERY_S)
                self._do(self.rng.choices(list(FAULTS), list(FAULTS.values()))[0])
            if now_s > peers_s:
                peers_s = now_s + PEERS_EVERY_S
                self._tell_peers()

    def settle(self) -> None:
        """Every request gets its answer; then nothing may be held anywhere."""
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        while (self._orphans or any(replica.open for replica in self.world.replicas)) and time.monotonic() < deadline_s:
            self._submit(fresh=False)
            self._take(0.05)
        left = len(self._orphans) + sum(len(replica.open) for replica in self.world.replicas)
        if left:
            self.problems.append(f"{left} requests have no answer")
        if not wait_for(self._replicas_rest, QUIET_TIMEOUT_S):
            self.problems.append(f"replicas hold something: {self.answers}")
        for number, store in enumerate(self.world.stores):
            held = asyncio.run(self._store_rests(store.address, sum(self.world.nodes[each.name] == number for each in self.world.replicas)))
            self.problems += [f"store {number}: {problem}" for problem in held]

    def _submit(self, *, fresh: bool = True) -> None:
        ready = [replica for replica in self.world.replicas if replica.is_ready and len(replica.open) < OPEN_PER_REPLICA]
        for replica in ready:
            if self._orphans:
                request = self._orphans.pop()
                self.counts["resubmitted"] += 1
            elif fresh:
                request = self._new_request()
            else:
                continue
            replica.open[str(request["id"])] = request
            replica.send(request)

    def _new_request(self) -> dict[str, object]:
        family = self.rng.choice(self._families)
        prompt = family[: self.rng.randrange(100, len(family))] if self.rng.random() < 0.3 else family
        prompt = [*prompt, *(self.rng.randrange(VOCAB_SIZE) for _ in range(self.rng.randrange(1, 60)))]
        self.counts["requests"] += 1
        return {"id": f"request-{self.counts['requests']}", "prompt": prompt, "max_tokens": self.rng.randrange(2, 24)}

    def _take(self, timeout_s: float) -> None:
        try:
            replica, message = self.world.inbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        if message is None:
            self._orphans += replica.open.values()
            replica.open.clear()
            if replica in self.world.replicas:
                self.world.replace(replica)
        elif "stats" in message:
            self.answers.append({"name": replica.name, **message})
        else:
            self._answered(replica, message)

    def _answered(self, replica: Replica, message: dict[str, object]) -> None:
        request = replica.open.pop(str(message["id"]), None)
        if request is None:
            return
        if message["error"]:  # its rank was killed: the replica ends too
            self._orphans.append(request)
            return
        expected = expected_tokens(request["prompt"], request["max_tokens"])  # type: ignore[arg-type]
        self.counts["answered"] += 1
        self.counts["tokens"] += len(expected)
        if message["tokens"] != expected:
            self.counts["wrong"] += 1
            self.problems.append(f"{message['id']} on {replica.name}: {message['tokens']} instead of {expected}")
        cached: list[int] = message["cached"] or [0] * len(TIERS)  # type: ignore[assignment]
        self.tokens.update(dict(zip(TIERS, cached, strict=True)))
        self.tokens["computed"] += len(request["prompt"]) - sum(cached)  # type: ignore[arg-type]

    def _do(self, fault: str) -> None:
        ready = [replica for replica in self.world.replicas if replica.is_ready]
        store = self.rng.choice(self.world.stores)
        if not ready and "store" not in fault:
            return
        self.faults[fault] += 1
        if fault == "engine killed":
            kill(self.rng.choice(ready).process.pid)
        elif fault == "rank killed":
            kill(self.rng.choice(ready).rank)
        elif fault == "store killed":
            kill(store.pid)
        else:
            pid = store.pid if "store" in fault else self.rng.choice(ready).process.pid
            kill(pid, signal.SIGSTOP)
            timer = threading.Timer(1.0, kill, (pid, signal.SIGCONT))
            timer.daemon = True
            timer.start()

    def _tell_peers(self) -> None:
        try:
            asyncio.run(self.world.tell_peers())
        except StoreError:
            self.counts["stores that did not hear"] += 1  # stopped or just killed: it hears the next time

    def _replicas_rest(self) -> bool:
        """Whether every replica has given back all pages and slots."""
        self.answers.clear()
        for replica in self.world.replicas:
            replica.send({"ask": "stats"})
        deadline_s = time.monotonic() + 5.0
        while len(self.answers) < len(self.world.replicas) and time.monotonic() < deadline_s:
            self._take(0.05)
        names = {str(answer["name"]) for answer in self.answers}
        held = [
            answer
            for answer in self.answers
            if answer["problems"] or any(answer["stats"][name] for name in ("used_pages", "leased_slots", "blocks_pending_offer"))  # type: ignore[index]
        ]
        return names == {replica.name for replica in self.world.replicas} and not held

    async def _store_rests(self, address: str, num_sessions: int) -> list[str]:
        deadline_s = time.monotonic() + 20.0
        async with StoreClient(address, SECRET) as client:
            while True:
                try:
                    stat, problems = await client.stat(), await client.check()
                except StoreError as error:
                    if time.monotonic() > deadline_s:
                        return [str(error)]
                    await asyncio.sleep(0.2)
                    continue
                held = {
                    "held": stat.held_slots, "quarantined": stat.quarantined_slots, "pinned": stat.pinned_blocks, "leases": stat.leases,
                    "sessions beyond": stat.sessions - num_sessions,
                }  # fmt: skip
                if not any(held.values()) and not problems:
                    return []
                if time.monotonic() > deadline_s:
                    return [*problems, str(held)]
                await asyncio.sleep(0.2)


def show(soak: Soak, seconds: float, console: Console) -> None:
    table = Table("what", "count", title=f"soak, {seconds:.0f} s")
    rows = [(name, number) for name, number in soak.faults.items()]
    rows += [(name, soak.counts[name]) for name in ("requests", "answered", "resubmitted", "tokens")]
    rows += [(f"prompt tokens from {tier}", soak.tokens[tier]) for tier in (*TIERS, "computed")]
    for name, number in rows:
        table.add_row(name, f"{number:,}")
    table.add_row("wrong answers", f"{soak.counts['wrong']}", style="bold")
    table.add_row("leaks and violated invariants", f"{len(soak.problems) - soak.counts['wrong']}", style="bold")
    console.print(table)
    for problem in soak.problems[:20]:
        console.print(problem, style="red", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    console = Console()
    console.print(f"seed {arguments.seed}", highlight=False)
    os.environ[MARK] = f"{os.getpid()}-{arguments.seed}"
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="soak-") as memory, tempfile.TemporaryDirectory(prefix="soak-") as disk:
        world = World(Path(memory), Path(disk))
        soak = Soak(world, arguments.seed)
        try:
            world.wait_ready()
            with Progress(console=console) as progress:
                soak.run(arguments.seconds, progress)
            soak.settle()
        finally:
            world.close()
        if not wait_for(lambda: not marked_processes(), 20.0):
            soak.problems.append(f"processes are left: {marked_processes()}")
        left = sorted(path.name for path in Path(memory).iterdir())
        if left:
            soak.problems.append(f"files are left in shared memory: {left}")
    show(soak, arguments.seconds, console)
    return 1 if soak.problems or not soak.counts["answered"] else 0


if __name__ == "__main__":
    sys.exit(main())
