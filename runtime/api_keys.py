"""API keys and the tenants they stand for.

The file is TOML: a line `tenant = "key"` per tenant, or `tenant = ["old key", "new key"]` while a key is being replaced. Only digests of
keys are kept and passed around; a key itself is known to its tenant and to the file.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from runtime.errors import Unauthenticated

HEADER = "authorization"
MIN_KEY_CHARS = 8

ApiKeys = tuple[tuple[str, str], ...]  # (tenant, SHA-256 of a key in hex)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """The metadata that presents a key; none for an empty one."""
    return ((HEADER, f"Bearer {key}"),) if key else ()


def read_api_keys(path: str | Path) -> ApiKeys:
    """ValueError, which names the tenant, for a file that cannot be read or holds a key that could not be told from another's."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    owners: dict[str, str] = {}
    for tenant, value in table.items():
        for key in value if isinstance(value, list) else [value]:
            if not tenant or not isinstance(key, str) or len(key) < MIN_KEY_CHARS or not (key.isascii() and key.isprintable()):
                raise ValueError(f"{path}: the key of {tenant!r} must be a string of at least {MIN_KEY_CHARS} printable ASCII characters")
            if owners.setdefault(_digest(key), tenant) != tenant:
                raise ValueError(f"{path}: {tenant!r} and {owners[_digest(key)]!r} have the same key")
    if not owners:
        raise ValueError(f"{path}: holds no key")
    return tuple((tenant, digest) for digest, tenant in owners.items())


class Tenants:
    """Tells callers apart. Without keys everybody is the tenant of no name."""

    def __init__(self, keys: ApiKeys, secret: str) -> None:
        """`secret`: the cluster's own, with which the deployment's driver looks at its front doors; its tenant has no name."""
        self._owners = {digest: tenant for tenant, digest in keys}
        if self._owners and secret:
            self._owners[_digest(secret)] = ""

    def tenant_of(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
        """Unauthenticated where keys are asked for and the metadata holds none that is known."""
        if not self._owners:
            return ""
        presented: Sequence[str] = [str(value) for name, value in metadata or () if name == HEADER]
        if not presented:
            raise Unauthenticated(f"{HEADER}: an API key is needed; send metadata '{HEADER}: Bearer KEY'")
        scheme, _, key = presented[0].partition(" ")
        tenant = self._owners.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise Unauthenticated(f"{HEADER}: this API key is not known here")
        return tenant


def _digest(key: str) -> str:
    """Looking a digest up takes a time that says nothing about the keys that are known."""
    return hashlib.sha256(key.encode()).hexdigest()
