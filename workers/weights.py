"""Fills a model's parameters from safetensors files.

A rank reads only the rows it keeps, a few megabytes at a time, on several threads. A parameter's name is its checkpoint tensor's name,
except where the model keeps several tensors as one: `MERGED` lists those, in the order of the parameter's parts.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import nn

from workers.checkpoint import DTYPES, Checkpoint, StoredTensor, TensorFile
from workers.errors import BadTensor
from workers.layers.parameter import Part
from workers.models.config import FP8_BLOCK, ModelConfig

Progress = Callable[[str, int, int], None]  # (phase, bytes done, bytes in all)

MERGED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "q_kv_a_proj": ("q_proj", "kv_a_proj_with_mqa"),
}
CHUNK_BYTES = 4 << 20  # read at a time by a thread; at least one row
MAX_THREADS = 8
_TOLERATED = (r"\.rotary_emb\.inv_freq$", r"\.weight_scale_inv$")  # recomputed; read along with their weight
_FLOAT8 = "F8_E4M3"
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, _FLOAT8: torch.float8_e4m3fn}


def checkpoint_names(name: str, num_parts: int) -> list[str]:
    """The checkpoint's names of a parameter's parts, in their order."""
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    if kind in ("gate_up_proj", "down_proj"):  # experts: one parameter for all, one tensor per expert
        leaves = MERGED.get(kind, (kind,))
        return [f"{module}.{expert}.{leaf}.weight" for expert in range(num_parts // len(leaves)) for leaf in leaves]
    return [f"{parent}.{leaf}.{kind}" for leaf in MERGED.get(leaf, (leaf,))][-num_parts:] if parent else [name]


def wanted_parts(model: nn.Module) -> Iterator[tuple[str, Part, nn.Parameter]]:
    """(checkpoint tensor, part, parameter) of everything the model holds. Tied parameters come once."""
    for name, parameter in model.named_parameters():
        full_name = name if name.startswith("lm_head.") else f"model.{name}"
        parts: tuple[Part, ...] = parameter.parts
        yield from ((tensor, part, parameter) for tensor, part in zip(checkpoint_names(full_name, len(parts)), parts, strict=True))


def check_weights(model: nn.Module, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """BadTensor names every tensor that is missing, unexpected, mis-shaped or of a dtype that cannot be loaded. `model` may be on the meta
    device: only its parameters' parts are looked at."""
    wanted = {tensor: part.shape for tensor, part, _ in wanted_parts(model)}
    stored = checkpoint.file_of.keys()
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - stored)]
    for name in sorted(wanted.keys() & stored):
        problems += _problems(name, wanted[name], checkpoint, config)
    problems += [
        f"{name} is not part of {config.architecture}" for name in sorted(stored - wanted.keys()) if not _is_tolerated(name, config)
    ]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise BadTensor(f"{checkpoint.folder}: {shown}")


def _problems(name: str, shape: tuple[int, ...], checkpoint: Checkpoint, config: ModelConfig) -> Iterator[str]:
    stored, scale_name = checkpoint[name], f"{name}_scale_inv"
    if stored.shape != shape:
        yield f"{name} has shape {list(stored.shape)} where {list(shape)} is expected"
    if stored.dtype not in DTYPES or (stored.dtype == _FLOAT8 and config.quantisation != "fp8"):
        yield f"{name} has dtype {stored.dtype}, which cannot be loaded"
    elif stored.dtype == _FLOAT8 and scale_name not in checkpoint:
        yield f"{scale_name} is missing"
    elif stored.dtype == _FLOAT8:
        blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
        scale = checkpoint[scale_name]
        if scale.shape != blocks or scale.dtype not in ("F32", "BF16", "F16"):
            yield f"{scale_name} is {scale.dtype} {list(scale.shape)} where F32 {list(blocks)} is expected"


def load_weights(model: nn.Module, checkpoint: Checkpoint, progress: Progress) -> None:
    """Fills `model` from the checkpoint, which `check_weights` has found to fit. BadTensor when a file changes meanwhile."""
    chunks = [
        chunk
        for tensor, part, parameter in wanted_parts(model)
        for chunk in _chunks(checkpoint, tensor, part.source, parameter.data[part.target])
    ]
    report = ProgressReport(progress, sum(chunk.target.nbytes for chunk in chunks))
    buffers = _Buffers(pinned=any(chunk.target.is_cuda for chunk in chunks[:1]))
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "load-weights") as threads:
        try:
            for num_bytes in threads.map(lambda chunk: chunk.fill(buffers.get(chunk.num_bytes)), chunks):
                report.add(num_bytes)
        finally:
            threads.shutdown(cancel_futures=True)


class ProgressReport:
    """Tells `progress` of the first byte, the last one, and about every hundredth part between."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = self._reported = 0
        progress("weights", 0, total)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done == self._total or self._done - self._reported > self._total // 100:
            self._progress("weights", self._done, self._total)
            self._reported = self._done


class _Buffers(threading.local):
    """One reading buffer per thread, as large as the largest chunk that it has read."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def get(self, num_bytes: int) -> torch.Tensor:
        if len(self._buffer) < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._buffer[:num_bytes]


class _Chunk(NamedTuple):
    """Some whole rows of a stored tensor, and the part of a parameter that takes them (or some of their columns)."""

    file: TensorFile
    stored: StoredTensor
    first: int  # row
    columns: slice | None  # None: the tensor has one dimension
    target: torch.Tensor
    scales: torch.Tensor | None  # of float8: [row blocks, column blocks] of the whole tensor

    @property
    def num_bytes(self) -> int:
        return len(self.target) * self.stored.row_bytes

    @torch.inference_mode()  # a thread's own: whoever builds a model inside it gets tensors that only it may write
    def fill(self, buffer: torch.Tensor) -> int:
        """Reads through `buffer` [num_bytes], converting to the target's dtype; float8 blocks are scaled. Returns the bytes filled."""
        self.file.read_rows(self.stored, self.first, memoryview(buffer.numpy()))
        values = buffer.view(_TORCH_DTYPES[self.stored.dtype]).view(len(self.target), *self.stored.shape[1:])
        if self.columns is not None:
            values = values[:, self.columns]
        values = values.to(self.target.device)
        if self.scales is not None and self.columns is not None:
            rows = torch.arange(self.first, self.first + len(values)) // FP8_BLOCK
            columns = torch.arange(self.columns.start, self.columns.stop) // FP8_BLOCK
            values = values.float().mul_(self.scales[rows][:, columns].to(values.device))
        self.target.copy_(values)
        return self.target.nbytes


def _chunks(checkpoint: Checkpoint, name: str, source: tuple[slice, ...], target: torch.Tensor) -> Iterator[_Chunk]:
    """Parts that begin at a row are cut into runs of rows of about CHUNK_BYTES."""
    file, stored = checkpoint.file_of[name], checkpoint[name]
    scales = _read_scales(checkpoint, f"{name}_scale_inv") if stored.dtype == _FLOAT8 else None
    columns = source[1] if len(source) > 1 else None
    if target.numel() == 0:
        return
    num_rows = max(1, CHUNK_BYTES // stored.row_bytes)
    for start in range(0, len(target), num_rows):
        yield _Chunk(file, stored, source[0].start + start, columns, target[start : start + num_rows], scales)


def _read_scales(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    file, stored = checkpoint.file_of[name], checkpoint[name]
    buffer = torch.empty(stored.shape[0] * stored.row_bytes, dtype=torch.uint8)
    file.read_rows(stored, 0, memoryview(buffer.numpy()))
    return buffer.view(_TORCH_DTYPES[stored.dtype]).view(stored.shape).float()


def _is_tolerated(name: str, config: ModelConfig) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_layers:
        return True  # multi-token-prediction layers behind the last
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return True
    return any(re.search(pattern, name) for pattern in _TOLERATED)
