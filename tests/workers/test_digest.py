"""A checkpoint's digest: over all bytes, taken from blob names where a hub cache has them, remembered while files stay the same."""

import hashlib
import json
import os

import pytest

from workers.digest import dummy_digest, weights_digest
from workers.errors import BadTensor


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mobula" / "digests"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"x" * 5_000_000)
    (folder / "b.safetensors").write_bytes(b"y")
    return folder


def digest_of(folder):
    """The digest, after the folder got an index of what is in it."""
    names = [path.name for path in folder.glob("*.safetensors")]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name for name in names}}))
    return weights_digest(folder)


def test_every_byte_and_every_name_counts(model):
    digests = {digest_of(model)}
    content = bytearray(b"x" * 5_000_000)
    content[-1] ^= 1
    (model / "a.safetensors").write_bytes(content)
    digests.add(digest_of(model))
    (model / "b.safetensors").rename(model / "c.safetensors")
    digests.add(digest_of(model))
    (model / "c.safetensors").unlink()
    digests.add(digest_of(model))
    assert len(digests) == 4
    assert all(len(digest) == 16 for digest in digests)
    (model / "config.json").write_text("{}")
    assert digest_of(model) in digests


def test_unchanged_files_are_not_read_again(model, cache):
    first = digest_of(model)
    entries = sorted(cache.iterdir())
    assert len(entries) == 2
    assert {entry.read_bytes() for entry in entries} == {hashlib.sha256(b"x" * 5_000_000).digest(), hashlib.sha256(b"y").digest()}
    for entry in entries:
        entry.write_bytes(b"\1" * 32)  # a lie that only a reader of the cache believes
    assert digest_of(model) != first
    later = (model / "b.safetensors").stat().st_mtime_ns + 1
    os.utime(model / "a.safetensors", ns=(later, later))
    os.utime(model / "b.safetensors", ns=(later, later))
    assert digest_of(model) == first


def test_damaged_and_unwritable_caches_only_cost_time(model, cache, monkeypatch):
    first = digest_of(model)
    for entry in cache.iterdir():
        entry.write_bytes(b"short")
    assert digest_of(model) == first
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert digest_of(model) == first


def test_blob_names_of_a_hub_cache_are_taken(tmp_path, model, cache):
    """The same content gives the same digest, read or named; a name that is not a SHA-256 is not believed."""
    plain = digest_of(model)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors"):
        digest = hashlib.sha256((model / name).read_bytes()).hexdigest()
        (blobs / digest).write_bytes(b"not read")
        (snapshot / name).symlink_to(blobs / digest)
    known = len(list(cache.iterdir()))
    assert digest_of(snapshot) == plain
    assert len(list(cache.iterdir())) == known
    (blobs / "etag").write_bytes(b"y")
    (snapshot / "b.safetensors").unlink()
    (snapshot / "b.safetensors").symlink_to(blobs / "etag")
    assert digest_of(snapshot) == plain


def test_files_that_are_not_loaded_do_not_count(model):
    """Some repositories keep a second copy of the weights in another format's names."""
    before = digest_of(model)
    (model / "consolidated.safetensors").write_bytes(b"z")
    assert weights_digest(model) == before
    assert digest_of(model) != before


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(BadTensor, match="does not exist; weights must be safetensors"):
        weights_digest(tmp_path)


def test_dummy_digests_depend_on_config_and_seed():
    assert len({dummy_digest(config, seed) for config in (b"a", b"b") for seed in (0, 1, 10)}) == 6
