"""One replica in a process of its own: an engine, one rank in a child, and the store it is given. Speaks JSON lines.

in    {"id", "prompt", "max_tokens"} | {"ask": "stats"}
out   {"ready", "rank"} first, then {"id", "tokens", "cached", "error"} and {"stats", "problems"}
"""

from __future__ import annotations

import json
import os
import sys
import threading
from array import array
from typing import Any

from cache_store.processes import process_identity
from runtime.engine.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.frames import Load, RequestOutput
from runtime.engine.live import EngineRequest
from runtime.engine.rates import ReplicaRates
from runtime.engine.store_port import RemoteStore
from runtime.errors import GroupFailed
from workers.config import WorkerConfig
from workers.group import GroupListener
from workers.local import spawn_ranks
from workers.step import SamplingSettings
from workers.worker import RankParts

PARTS = RankParts("tests.soak.chain_runner:ChainRunner", "workers.echo:NoCommunicator")
SECRET = "soak"


class Sink:
    """Collects what a request is given, and says it when it ends."""

    def __init__(self) -> None:
        self._open: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()  # protects stdout: engine and main thread speak

    def say(self, message: dict[str, Any]) -> None:
        with self._lock:
            print(json.dumps(message), flush=True)

    def __call__(self, outputs: dict[int, list[RequestOutput]], _load: Load) -> None:
        for output in (each for batch in outputs.values() for each in batch):
            request = self._open.setdefault(output.request_id, {"id": output.request_id, "tokens": [], "cached": None, "error": None})
            request["tokens"] += output.token_ids
            request["cached"] = output.cached if output.cached is not None else request["cached"]
            if output.finish_reason or output.error:
                request["error"] = output.error
                self.say(self._open.pop(output.request_id))


def serve(engine: Engine, sink: Sink) -> None:
    """Until stdin ends."""
    for line in sys.stdin:
        message = json.loads(line)
        if "ask" in message:
            sink.say({"stats": engine.stats()._asdict(), "problems": engine.check()})
            continue
        prompt = array("I", message["prompt"])
        engine.submit(EngineRequest(0, message["id"], prompt, SamplingSettings(temperature=0.0), message["max_tokens"]))


def main() -> int:
    name, store_address = sys.argv[1:]
    config = WorkerConfig(model="none", device="cpu")
    engine_config = EngineConfig(replica_id=name, max_num_seqs=16, max_num_batched_tokens=256)
    rates = ReplicaRates()
    with (
        GroupListener(1, secret=SECRET) as listener,
        spawn_ranks(listener.address, 1, SECRET, parts=PARTS) as ranks,
        listener.accept(60.0, check=ranks.check) as group,
        RemoteStore(store_address, SECRET, name, probe_every_s=0.3, rates=rates) as remote,
    ):
        group.load(config, lambda *progress: None, timeout_s=60.0)
        sink = Sink()
        processes = (process_identity(os.getpid()),)
        engine = Engine(engine_config, group, remote, sink, processes=processes, rates=rates)
        sink.say({"ready": name, "rank": ranks.pids[0]})
        reader = threading.Thread(target=lambda: (serve(engine, sink), engine.stop()), daemon=True)
        reader.start()
        failure: GroupFailed | None = engine.run()
        return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
