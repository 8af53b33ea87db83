"""Writes a checkpoint of a shape, so that every system runs the same weights: those that `--load-format dummy` would make up.

usage: python -m tests.bench.gpu_checkpoint SHAPE FOLDER

The tensors are made on the GPU where there is one. The index is written last: a folder that has it is complete, and is left as it is.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.bench.gpu_shapes import SHAPES
from workers.checkpoint import INDEX
from workers.dummy import fill_dummy
from workers.layers.parameter import Part, Placement
from workers.models.build import outline
from workers.models.config import load_model_config
from workers.parallel import Communicator
from workers.weights import wanted_parts

SHARD_BYTES = 4 << 30
SEED = 0
MAX_THREADS = 4
_ELEMENT_BYTES = 2  # bfloat16


class Tensor(NamedTuple):
    """One tensor of the checkpoint."""

    name: str
    part: Part

    @property
    def num_bytes(self) -> int:
        return math.prod(self.part.shape) * _ELEMENT_BYTES


def tensors_of(folder: Path) -> list[Tensor]:
    """Everything that the model of `folder`/config.json holds. Takes no memory."""
    placement = Placement(Communicator.single("cpu"), torch.bfloat16, torch.device("meta"))
    return [Tensor(name, part) for name, part, _ in wanted_parts(outline(load_model_config(folder), placement))]


def shards_of(tensors: Sequence[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """In order, each of about `shard_bytes`."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size >= shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def is_complete(folder: Path, raw: dict[str, Any]) -> bool:
    """Whether `folder` holds a checkpoint of the config `raw`, written to the end."""
    try:
        sizes = json.loads((folder / INDEX).read_text())["metadata"]["file_bytes"]
        is_whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return is_whole and bool(json.loads((folder / "config.json").read_text()) == raw)
    except (OSError, ValueError, KeyError):
        return False


def write_checkpoint(folder: Path, raw: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> float:
    """Seconds; 0 when it is there already. OSError when the disk is too small."""
    if is_complete(folder, raw):
        return 0.0
    began_s = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (INDEX, "*.safetensors"):
        for path in folder.glob(old):
            path.unlink()
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = tensors_of(folder)
    total_bytes, free_bytes = sum(tensor.num_bytes for tensor in tensors), shutil.disk_usage(folder).free
    if free_bytes < total_bytes * 1.01:
        raise OSError(f"{folder} has {free_bytes / 1e9:.1f} GB free, and the checkpoint takes {total_bytes / 1e9:.1f}; see --checkpoints")
    shards = shards_of(tensors, shard_bytes)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = [folder / name for name in names]
    with ThreadPoolExecutor(min(MAX_THREADS, len(shards))) as threads:
        for path, num_bytes in zip(paths, threads.map(_write_shard, paths, shards, [device] * len(shards)), strict=True):
            seconds = time.perf_counter() - began_s
            print(f"  {path.name}: {num_bytes / 1e9:.2f} of {total_bytes / 1e9:.1f} GB at {seconds:.1f} s", file=sys.stderr, flush=True)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    scratch = folder / f"{INDEX}.part"
    metadata = {"total_size": total_bytes, "file_bytes": {path.name: path.stat().st_size for path in paths}}
    scratch.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    os.replace(scratch, folder / INDEX)
    return time.perf_counter() - began_s


@torch.inference_mode()
def _write_shard(path: Path, tensors: Sequence[Tensor], device: torch.device) -> int:
    """One file in the safetensors format; returns its bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.part.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            values = torch.empty(tensor.part.shape, dtype=torch.bfloat16, device=device)
            fill_dummy(values, tensor.name, tensor.part, SEED)
            _write_all(file.fileno(), memoryview(values.cpu().view(torch.uint8).numpy()).cast("B"))
    return path.stat().st_size


def _write_all(descriptor: int, buffer: memoryview) -> None:
    """The kernel takes at most 2 GiB at a time."""
    while buffer:
        buffer = buffer[os.write(descriptor, buffer) :]


def main() -> None:
    shape, folder = sys.argv[1:]
    seconds = write_checkpoint(Path(folder), SHAPES[shape])
    print(f"{shape}: checkpoint {f'written in {seconds:.1f} s' if seconds else 'found'} in {folder}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
