"""Settings of a deployment: parsed once from file, environment and flags, then passed down unchanged.

Precedence: `--config FILE.toml` < `MOBULA_<NAME>` < flags. Sizes take KiB, MiB or GiB.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from cache_store.config import StoreConfig
from runtime.api_keys import ApiKeys, read_api_keys
from runtime.errors import UsageError
from workers.config import WorkerConfig

DEFAULT_DEPLOYMENT = "mobula"
EMBEDDED_MODELS = Path(__file__).resolve().parents[1] / "deploy" / "demo"  # folders gqa and mla
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes from '512MiB', '1.5 GiB' or a plain count. ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for instance 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Everything `mobula serve` can be told. A size is in bytes."""

    model: str = ""
    served_model_name: tuple[str, ...] = ()  # requests may use any of them; none: the folder's name
    replicas: int = 1
    tensor_parallel_size: int = 1
    policy: str = "prefix_affinity"
    kv_memory: int | None = None  # per rank; None: 1 GiB on the CPU, what the card has to spare on CUDA
    store_memory: int = 1 << 30  # per node; 0: no store
    disk_memory: int = 0  # per node, of the store's tier on disk; 0: none
    disk_directory: str = ""  # where it lies; empty: under the user's cache directory. One store at a time uses it
    host: str = "127.0.0.1"
    port: int = 50051  # 0 picks one
    metrics_port: int | None = None  # of the front door's Prometheus endpoint; None: none, 0 picks one
    store_metrics_port: int | None = None  # of the store's, the same on every node; None: none
    api_keys: ApiKeys = ()  # written as the name of a file; none: callers are not told apart
    dtype: str = "auto"
    load_format: str = "auto"  # "auto" and "safetensors" read the checkpoint; "dummy" makes weights up
    weights_seed: int = 0  # of dummy weights
    device: str = "auto"
    attention_backend: str = "auto"
    block_size: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # of one step; None: 8192 on CUDA, 2048 on the CPU
    max_prompt_tokens_beside_outputs: int | None = None  # of a step that gives a running request a token; None: 768, with experts 1,536
    max_queued_requests: int = 4096
    max_queued_tokens: int = 4_000_000
    max_message_size: int = 16 << 20
    deployment: str = DEFAULT_DEPLOYMENT  # several may share a Ray cluster

    def __post_init__(self) -> None:
        for name, low in (
            ("replicas", 1),
            ("tensor_parallel_size", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_prompt_tokens_beside_outputs", 1),
            ("port", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{flag_of(name)} must be at least {low}, not {value}")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 1 << 16:
            raise UsageError(f"--metrics-port must be a port or 0, not {self.metrics_port}")
        if self.store_metrics_port is not None and not 0 < self.store_metrics_port < 1 << 16:
            raise UsageError(f"--store-metrics-port must be a port, not {self.store_metrics_port}")
        if self.disk_memory and not self.store_memory:
            raise UsageError("--disk-memory needs --store-memory: blocks come back from disk through the store's memory")
        if self.load_format not in ("auto", "safetensors", "dummy"):
            raise UsageError(f"--load-format must be auto, safetensors or dummy, not {self.load_format!r}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", self.deployment):
            raise UsageError(f"--deployment must be lower-case letters, digits and dashes, not {self.deployment!r}")

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.served_model_name or (Path(self.model).resolve().name,)

    @property
    def is_local(self) -> bool:
        """Whether everything listens on loopback only."""
        return self.host in ("127.0.0.1", "localhost")

    def store_config(self, secret: str) -> StoreConfig:
        """One node's store."""
        return StoreConfig(
            memory_bytes=self.store_memory,
            secret=secret,
            peer_address="127.0.0.1:0" if self.is_local else "0.0.0.0:0",
            metrics_address=f"{self.host}:{self.store_metrics_port}" if self.store_metrics_port else "",
            disk_bytes=self.disk_memory,
            disk_directory=self.disk_directory or default_disk_directory() if self.disk_memory else "",
        )

    def worker_config(self) -> WorkerConfig:
        return WorkerConfig(
            model=self.model,
            tensor_parallel_size=self.tensor_parallel_size,
            dtype=self.dtype,
            load_format="dummy" if self.load_format == "dummy" else "safetensors",
            seed=self.weights_seed,
            device=self.device,
            attention_backend=self.attention_backend,
            block_size=self.block_size,
            kv_memory_bytes=self.kv_memory,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
        )


def default_disk_directory() -> str:
    return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mobula" / "store")


_SIZES = {"kv_memory", "store_memory", "disk_memory", "max_message_size"}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse_names(value: str | Sequence[str]) -> tuple[str, ...]:
    """From 'a,b' or a list. ValueError for an empty or doubled name."""
    names = tuple(name.strip() for part in ([value] if isinstance(value, str) else value) for name in str(part).split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{value!r} must be one or several different names, separated by commas")
    return names


_PARSERS: dict[str, Callable[[Any], Any]] = {"served_model_name": _parse_names, "api_keys": read_api_keys}


def _parser(name: str, hint: Any) -> Callable[[Any], Any]:
    if name in _PARSERS:
        return _PARSERS[name]
    if name in _SIZES:
        return parse_size
    if hint is int or hint == (int | None):
        return int
    return str


def resolve_settings(flags: Mapping[str, object], config_file: Path | None, environment: Mapping[str, str]) -> ServeSettings:
    """Merges the three sources; a flag that is None was not given. UsageError names the source of a bad value."""
    hints = get_type_hints(ServeSettings)
    parsers = {field.name: _parser(field.name, hints[field.name]) for field in fields(ServeSettings)}
    values: dict[str, Any] = {}

    def take(name: str, value: object, source: str) -> None:
        if name not in parsers:
            raise UsageError(f"{source}: there is no setting of that name; see mobula serve --help")
        try:
            values[name] = parsers[name](value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{source}: {error}") from error

    if config_file is not None:
        try:
            table = tomllib.loads(config_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"--config {config_file}: {error}") from error
        for key, value in table.items():
            take(key.replace("-", "_"), value, f"{config_file}: {key}")
    for name in parsers:
        variable = f"MOBULA_{name.upper()}"
        if variable in environment:
            take(name, environment[variable], variable)
    for name, value in flags.items():
        if value is not None and value != []:  # an option that may be repeated and was not given
            take(name, value, flag_of(name))
    return ServeSettings(**values)
