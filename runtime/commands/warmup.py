"""`mobula warmup`: builds ahead the kernels that serving a model on a GPU needs, so that a start finds them in the caches.

A rank of its own loads the model with its first layers only and made-up weights: every kernel is there, the weights are not.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from runtime.config import ServeSettings
from workers.group import GroupListener
from workers.local import spawn_ranks
from workers.models.config import load_model_config

RANK_TIMEOUT_S = 120.0
BUILD_TIMEOUT_S = 1800.0  # without progress: a kernel takes minutes to compile
_NUM_DENSE_AND_EXPERT_LAYERS = 2
_MAX_MODEL_LEN = 4096
_KV_BYTES = 1 << 30


def warmup(settings: ServeSettings, console: Console) -> None:
    """CheckpointError for a folder that cannot be served, GroupFailed with the rank's words where there is no GPU."""
    config = load_model_config(settings.model)
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        _write_first_layers(Path(settings.model), Path(folder), config.moe.first_moe_layer if config.moe else 0)
        worker = replace(
            settings.worker_config(),
            model=folder,
            load_format="dummy",
            tensor_parallel_size=1,
            device="cuda",
            kv_memory_bytes=_KV_BYTES,
            max_model_len=min(config.max_model_len, _MAX_MODEL_LEN),
        )
        with GroupListener(1, secret=secret) as listener, spawn_ranks(listener.address, 1, secret) as ranks:
            with listener.accept(RANK_TIMEOUT_S, ranks.check) as group, _Bars(console) as bars:
                group.load(worker, bars.show, BUILD_TIMEOUT_S)
    console.print(f"kernels for {config.architecture} are built", highlight=False)


def _write_first_layers(model: Path, folder: Path, first_moe_layer: int) -> None:
    raw = json.loads((model / "config.json").read_text())
    raw["num_hidden_layers"] = min(raw["num_hidden_layers"], first_moe_layer + _NUM_DENSE_AND_EXPERT_LAYERS)
    (folder / "config.json").write_text(json.dumps(raw))


class _Bars:
    """A bar per phase of a load."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, rank: int, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=max(1, total))
        self._bars.update(self._tasks[phase], completed=done, total=max(1, total))
