"""The identity of a checkpoint's weights: a hash over all their bytes, remembered as long as the files do not change. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from cache_store.keys import hash_fields
from workers.checkpoint import weight_files
from workers.errors import BadTensor

_READ_BYTES = 1 << 22


def weights_digest(folder: str | Path) -> bytes:
    """16 bytes over the names and the content of the safetensors files that `folder`'s checkpoint is loaded from. BadTensor when there is
    none to read.

    A hub cache's file is a link to a blob named by its SHA-256, which is taken as is. Other files are hashed once; the result is kept
    under $XDG_CACHE_HOME/mobula by (device, inode, size, mtime).
    """
    paths = weight_files(Path(folder))
    try:
        return hash_fields("weights", *(field for path in paths for field in (path.name.encode(), _file_sha256(path))))
    except OSError as error:
        raise BadTensor(f"{folder} cannot be read: {error}") from error


def dummy_digest(block_digest_input: bytes, seed: int) -> bytes:
    """The identity of dummy weights: they are a function of the config and the seed."""
    return hash_fields("dummy-weights", block_digest_input, str(seed).encode())


def _file_sha256(path: Path) -> bytes:
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return bytes.fromhex(blob.name)
    with blob.open("rb") as file:
        before = os.fstat(file.fileno())
        cached = _cache_folder() / "-".join(str(n) for n in (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns))
        known = _read_cached(cached)
        if known is not None:
            return known
        digest = hashlib.sha256()
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadTensor(f"{path} changed while it was read")
    _write_cached(cached, digest.digest())
    return digest.digest()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobula" / "digests"


def _read_cached(path: Path) -> bytes | None:
    try:
        value = path.read_bytes()
    except OSError:
        return None
    return value if len(value) == 32 else None


def _write_cached(path: Path, value: bytes) -> None:
    """Best effort: without a writable cache the next start hashes again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(value)
        os.replace(file.name, path)
    except OSError:
        return
