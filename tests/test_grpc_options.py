"""gRPC ignores an option that it does not know, without a word: every name in the source must be one of the library's."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
from grpc._cython import cygrpc

REPOSITORY = Path(__file__).resolve().parents[1]


def test_every_option_is_known_to_the_library() -> None:
    library = Path(cygrpc.__file__).read_bytes()
    sources = [path for package in ("runtime", "workers", "cache_store") for path in (REPOSITORY / package).rglob("*.py")]
    names = {name for path in sources for name in re.findall(r'\("(grpc\.[a-z0-9_.]+)", ', path.read_text())}
    assert len(names) > 8
    unknown = {name for name in names if name.encode() + b"\0" not in library}
    assert unknown == set(), f"grpcio {grpc.__version__}"
