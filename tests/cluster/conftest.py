"""Real deployments: `mobula serve` in a process of its own, real Ray, real gRPC. Every process carries a mark in its environment, so that
a test can say whether anything at all was left behind."""

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cache_store.arena import is_served
from protos import inference_pb2 as pb
from runtime.client import InferenceClient

READY_TIMEOUT_S = 90.0
TINY_MLA = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def eventually(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Polls until true; fails the test at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.05)


def new_mark() -> str:
    return f"MOBULA_TEST_MARK={uuid.uuid4().hex}"


def marked_processes(mark: str) -> dict[int, str]:
    """Command lines of the live processes that inherited the mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found[int(entry.name)] = command
        except OSError:
            continue
    return found


def shared_memory_files() -> set[str]:
    """What no live store holds: other stores may come and go on this machine."""
    return {entry.name for entry in Path("/dev/shm").iterdir() if entry.name.startswith("mobula") and not _is_in_use(entry)}


def _is_in_use(path: Path) -> bool:
    """An arena is locked by its store, a socket is served by it."""
    if path.suffix == ".sock":
        return is_served(str(path))
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


class Served:
    """A `mobula` process of a test, its endpoint, and what it leaves behind."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.mark = new_mark()
        self.shared_memory_before = shared_memory_files()
        name, value = self.mark.split("=")
        environment = {**os.environ, name: value, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.deployment = f"test-{value[:8]}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runtime.cli", *arguments, *(["--deployment", self.deployment] if arguments[0] == "serve" else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        pairs = ((self.process.stdout, self.lines.put), (self.process.stderr, self.errors.append))
        self._pumps = [threading.Thread(target=self._pump, args=pair, daemon=True) for pair in pairs]
        for pump in self._pumps:
            pump.start()
        self.endpoint = ""

    @staticmethod
    def _pump(stream: Iterator[str], sink: Callable[[str], object]) -> None:
        for line in stream:
            sink(line)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                line = self.lines.get(timeout=0.2)
            except queue.Empty:
                assert self.process.poll() is None, f"serve ended: {''.join(self.errors)}"
                assert time.monotonic() < deadline, f"not ready: {''.join(self.errors)}"
                continue
            if line.startswith("ready "):
                self.endpoint = line.split()[1]
                return

    def find(self, fragment: str) -> list[int]:
        """Pids of this deployment's processes whose command line contains the fragment."""
        return sorted(pid for pid, command in marked_processes(self.mark).items() if fragment in command)

    def interrupt(self, timeout_s: float = 60.0) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout_s)

    def assert_nothing_left(self, timeout_s: float) -> None:
        eventually(lambda: not marked_processes(self.mark), timeout_s, f"the end of {marked_processes(self.mark)}")
        eventually(lambda: shared_memory_files() <= self.shared_memory_before, timeout_s, "removal from /dev/shm")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for pid in marked_processes(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pump in self._pumps:
            pump.join(10.0)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture(scope="session")
def tiny_mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-mla")
    (folder / "config.json").write_text(json.dumps(TINY_MLA))
    return folder


@pytest.fixture
def serve(tiny_mla: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*arguments: str, model: Path | None = None, environment: Mapping[str, str] | None = None) -> Served:
        common = ("--port", "0", "--load-format", "dummy", "--kv-memory", "32MiB", "--store-memory", "128MiB", "--block-size", "16")
        served = Served("serve", str(model or tiny_mla), *common, *arguments, environment=environment)
        started.append(served)
        served.wait_ready()
        return served

    yield start
    for served in started:
        served.close()


@pytest.fixture
def client_of() -> Iterator[Callable[[Served], InferenceClient]]:
    clients: list[InferenceClient] = []

    def connect(served: Served) -> InferenceClient:
        clients.append(InferenceClient(served.endpoint))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def ids_request(ids: list[int], *, max_tokens: int = 8, **fields: object) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling, **fields)


def wait_for_offers(client: InferenceClient, timeout_s: float = 20.0) -> None:
    eventually(lambda: not any(row.blocks_pending_offer for row in client.status().replicas), timeout_s, "offers")
