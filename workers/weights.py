"""Fills a model's parameters from safetensors files, or from a seed.

A rank reads only its slices. A parameter's name is its checkpoint tensor's name, except where the model keeps several tensors as one:
`MERGED` lists those, in the order of the parameter's parts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from workers.errors import BadTensor
from workers.layers.parameter import Part
from workers.models.config import ModelConfig
from workers.noise import mix_, mix_int, uniform

Progress = Callable[[str, int, int], None]  # (phase, bytes done, bytes in all)

MERGED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_TOLERATED = (r"\.rotary_emb\.inv_freq$", r"\.weight_scale_inv$")  # recomputed; read along with their weight
_FP8_BLOCK = 128
_DUMMY_SPREAD = 0.02 * 3**0.5  # of a uniform distribution with standard deviation 0.02
_DUMMY_ROWS_BYTES = 64 << 20


def checkpoint_names(name: str, num_parts: int) -> list[str]:
    """The checkpoint's names of a parameter's parts, in their order."""
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    if kind in ("gate_up_proj", "down_proj"):  # experts: one parameter for all, one tensor per expert
        leaves = MERGED.get(kind, (kind,))
        return [f"{module}.{expert}.{leaf}.weight" for expert in range(num_parts // len(leaves)) for leaf in leaves]
    return [f"{parent}.{leaf}.{kind}" for leaf in MERGED.get(leaf, (leaf,))][:num_parts] if parent else [name]


def wanted_parts(model: nn.Module) -> Iterator[tuple[str, Part, nn.Parameter]]:
    """(checkpoint tensor, part, parameter) of everything the model holds. Tied parameters come once."""
    for name, parameter in model.named_parameters():
        full_name = name if name.startswith("lm_head.") else f"model.{name}"
        parts: tuple[Part, ...] = parameter.parts
        yield from ((tensor, part, parameter) for tensor, part in zip(checkpoint_names(full_name, len(parts)), parts, strict=True))


def load_weights(model: nn.Module, config: ModelConfig, folder: str | Path, progress: Progress) -> None:
    """Fills `model` from the folder's safetensors. BadTensor names every tensor that is missing, unexpected or mis-shaped."""
    with ExitStack() as stack:
        checkpoint = _Checkpoint(Path(folder), stack)
        wanted = list(wanted_parts(model))
        checkpoint.check({tensor: part.shape for tensor, part, _ in wanted}, config)
        for tensor, part, target in _targets(wanted, progress):
            checkpoint.read_into(target, tensor, part.source)


def dummy_weights(model: nn.Module, seed: int, progress: Progress) -> None:
    """Fills `model` with values that depend only on the tensor's name, its shape, the element and the seed: at any tensor-parallel size
    the ranks' slices are those of the same whole. Norms are 1, biases 0, the others have standard deviation 0.02."""
    for tensor, part, target in _targets(list(wanted_parts(model)), progress):
        if len(part.shape) == 1:
            target.fill_(0.0 if tensor.endswith("bias") else 1.0)
        else:
            _fill_dummy(target, part, int.from_bytes(hashlib.blake2b(f"{tensor} {seed}".encode(), digest_size=4).digest(), "little"))


def _fill_dummy(target: torch.Tensor, part: Part, key: int) -> None:
    first_row, last_row = part.source[0].start, part.source[0].stop
    columns = torch.arange(part.source[1].start, part.source[1].stop, dtype=torch.int32, device=target.device)
    step = max(1, _DUMMY_ROWS_BYTES // (4 * max(1, len(columns))))
    for start in range(first_row, last_row, step):
        stop = min(start + step, last_row)
        rows = mix_(torch.arange(start, stop, dtype=torch.int32, device=target.device) ^ (mix_int(key) >> 1))
        values = uniform(mix_(columns ^ rows[:, None])).mul_(_DUMMY_SPREAD)
        target[start - first_row : stop - first_row] = values.to(target.dtype)


def _targets(wanted: list[tuple[str, Part, nn.Parameter]], progress: Progress) -> Iterator[tuple[str, Part, torch.Tensor]]:
    """(tensor, part, what to fill), reporting progress as the caller comes back for more."""
    targets = [(tensor, part, parameter.data[part.target]) for tensor, part, parameter in wanted]
    total = sum(target.nbytes for _, _, target in targets)
    done = reported = 0
    progress("weights", 0, total)
    for tensor, part, target in targets:
        yield tensor, part, target
        done += target.nbytes
        if done == total or done - reported > total // 100:
            progress("weights", done, total)
            reported = done


class _Checkpoint:
    """The safetensors files of a folder, opened (mapped) for as long as `stack`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._files = {}
        for path in weight_files(folder):
            try:
                self._files[path.name] = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise BadTensor(f"{path} cannot be read: {error}") from error
        self._file_of = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118

    def check(self, wanted: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
        problems = [f"{name} is missing" for name in sorted(wanted.keys() - self._file_of.keys())]
        for name in sorted(wanted.keys() & self._file_of.keys()):
            shape = tuple(self._file_of[name].get_slice(name).get_shape())
            if shape != wanted[name]:
                problems.append(f"{name} has shape {list(shape)} where {list(wanted[name])} is expected")
        extra = self._file_of.keys() - wanted.keys()
        problems += [f"{name} is not part of {config.architecture}" for name in sorted(extra) if not _is_tolerated(name, config)]
        if problems:
            shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
            raise BadTensor(f"{self.folder}: {shown}")

    def read_into(self, target: torch.Tensor, name: str, source: tuple[slice, ...]) -> None:
        """Copies the slices of one tensor, converting to the target's dtype; float8 blocks are scaled."""
        values = self._file_of[name].get_slice(name)[source]
        scale_name = f"{name}_scale_inv"
        if scale_name in self._file_of and values.dtype == torch.float8_e4m3fn:
            scales = self._file_of[scale_name].get_tensor(scale_name).float()
            rows, columns = (torch.arange(part.start, part.stop) // _FP8_BLOCK for part in source)
            values = values.float().mul_(scales[rows][:, columns])
        target.copy_(values)


def _is_tolerated(name: str, config: ModelConfig) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_layers:
        return True  # multi-token-prediction layers behind the last
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return True
    return any(re.search(pattern, name) for pattern in _TOLERATED)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint: those its index names, else the single file. BadTensor when there is none."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadTensor(f"{index} is not an index of safetensors files: {error}") from error
        paths = [folder / name for name in names]
    else:
        paths = [folder / "model.safetensors"]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise BadTensor(f"{', '.join(missing)} does not exist; weights must be safetensors (or use --load-format dummy)")
    return paths
