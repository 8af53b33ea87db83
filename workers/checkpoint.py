"""A checkpoint's safetensors files: which they are, what is in them, and the bytes of a tensor's rows. Imports no torch.

    file    8 bytes: length of the header    header: JSON, {name: {dtype, shape, data_offsets}}    data

The safetensors library judges a file when it is opened (lengths, overlaps, holes, dtypes). It reads tensors through a mapping, though,
and mapped pages count as this process's memory for as long as the file is open. So bytes are read by position instead, into the caller's
buffer.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

from safetensors import SafetensorError, safe_open

from workers.errors import BadTensor

DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}  # bytes per element of what can be loaded
INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit


class StoredTensor(NamedTuple):
    """One tensor in a file, row-major."""

    dtype: str  # as safetensors spells it; may be one that cannot be loaded
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    @property
    def row_bytes(self) -> int:
        """Of one index of the first dimension."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype]


class TensorFile:
    """One safetensors file, open for reading from any thread until `close`. BadTensor names the file when it is not sound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadTensor(f"{path} cannot be read: {error}") from error
        try:
            self.tensors = self._read_header()
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            os.close(self._fd)
            raise BadTensor(f"{path} cannot be read as safetensors: {error}") from error

    def _read_header(self) -> dict[str, StoredTensor]:
        with safe_open(self.path, framework="np") as judge:
            names = set(judge.keys())
        length = int.from_bytes(os.pread(self._fd, _LENGTH_BYTES, 0), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header of {length} bytes is too long")
        entries = json.loads(os.pread(self._fd, length, _LENGTH_BYTES).decode())
        entries.pop("__metadata__", None)
        data_start, size = _LENGTH_BYTES + length, os.fstat(self._fd).st_size
        tensors = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            tensor = tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), data_start + begin)
            known_bytes = DTYPES.get(tensor.dtype)
            if not 0 <= begin <= end <= size - data_start or (known_bytes and end - begin != known_bytes * math.prod(tensor.shape)):
                raise ValueError(f"{name} does not have the bytes of its shape")
        if tensors.keys() != names:
            raise ValueError("its header reads differently to different readers")
        return tensors

    def read_rows(self, tensor: StoredTensor, first: int, buffer: memoryview) -> None:
        """Fills `buffer` with whole rows from `first` on. BadTensor when the file has become shorter."""
        position = tensor.start + first * tensor.row_bytes
        while buffer:
            count = os.preadv(self._fd, [buffer], position)
            if count == 0:
                raise BadTensor(f"{self.path} has become shorter while it was read")
            buffer, position = buffer[count:], position + count

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checkpoint:
    """All safetensors files of a folder, open until the `with` ends. BadTensor when one is not sound, or a tensor is in two of them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._stack = ExitStack()
        self.file_of: dict[str, TensorFile] = {}
        try:
            for path in weight_files(self.folder):
                self._add(self._stack.enter_context(TensorFile(path)))
        except BadTensor:
            self._stack.close()
            raise

    def _add(self, file: TensorFile) -> None:
        twice = sorted(self.file_of.keys() & file.tensors.keys())
        if twice:
            raise BadTensor(f"{twice[0]} is both in {self.file_of[twice[0]].path} and in {file.path}")
        self.file_of.update(dict.fromkeys(file.tensors, file))

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __getitem__(self, name: str) -> StoredTensor:
        return self.file_of[name].tensors[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint: those its index names, else the single file. BadTensor when there is none, or when
    the index names anything but a file beside it."""
    index = folder / INDEX
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadTensor(f"{index} is not an index of safetensors files: {error}") from error
        for name in names:
            if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors") or "\0" in name:
                raise BadTensor(f"{index} names {name!r}, which is not a safetensors file of this folder")
        if not names:
            raise BadTensor(f"{index} names no files")
    paths = [folder / name for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise BadTensor(f"{', '.join(missing)} does not exist; weights must be safetensors (or use --load-format dummy)")
    return paths
