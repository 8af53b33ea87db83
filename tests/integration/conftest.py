"""Every test here has replicas, which remember the digests of weights."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def own_digest_cache(digest_cache: None) -> None:
    pass
