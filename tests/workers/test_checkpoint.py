"""Hostile, truncated and contradictory checkpoint files: a BadTensor that names the file, or the bytes that the library reads."""

import json
import re
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from workers.checkpoint import INDEX, Checkpoint, TensorFile, weight_files
from workers.errors import BadTensor

SMALL = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
NUMBER = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**63 - 1, 2**64, -(2**63)]), st.floats(), st.none(), st.text(max_size=2))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "U8", "I64", "F4", "float32", None, 7]),
        "shape": st.one_of(st.lists(NUMBER, max_size=3), NUMBER),
        "data_offsets": st.one_of(st.lists(NUMBER, max_size=3), st.tuples(st.integers(0, 40), st.integers(0, 40)).map(list)),
    }
)
VALID = st.lists(st.tuples(st.sampled_from(["F32", "F16", "U8"]), st.lists(st.integers(0, 3), max_size=3)), max_size=4)


def write(path, header: bytes, data: bytes, length: int | None = None):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length % 2**64) + header + data)


def judge(path) -> dict[str, bytes] | None:
    """What the library reads, as bytes by name; None where it refuses."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, KeyError, AttributeError):
        return None


def read(path) -> dict[str, bytes]:
    found = {}
    with TensorFile(path) as file:
        for name, tensor in file.tensors.items():
            if tensor.dtype in ("F32", "F16") and 0 not in tensor.shape and tensor.shape:
                buffer = bytearray(tensor.shape[0] * tensor.row_bytes)
                file.read_rows(tensor, 0, memoryview(buffer))
                found[name] = bytes(buffer)
    return found


def check(path) -> None:
    """What the library refuses is refused by name; else what can be loaded is what the library reads."""
    known = judge(path)
    if known is None:
        with pytest.raises(BadTensor, match=re.escape(str(path))):
            read(path)
    else:
        assert read(path).items() <= known.items()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY, max_size=3), data=st.binary(max_size=48))
@example(header={"a": SMALL}, data=bytes(24))
@example(header={"a": SMALL}, data=bytes(23))
@example(header={"a": SMALL}, data=bytes(25))
@example(header={"a": SMALL, "b": SMALL}, data=bytes(24))
@example(header={"a": {**SMALL, "data_offsets": [8, 32]}}, data=bytes(32))
@example(header={"a": {**SMALL, "shape": [2**33, 2**33]}}, data=bytes(24))
@example(header={"a": {**SMALL, "dtype": "I64"}}, data=bytes(24))
def test_any_header(path, header, data):
    write(path, json.dumps(header).encode(), data)
    check(path)


@settings(max_examples=150, deadline=None)
@given(header=st.binary(max_size=40), data=st.binary(max_size=16), length=st.one_of(st.none(), st.integers(0, 80), st.just(2**63)))
@example(header=b"[" * 40, data=b"", length=None)
@example(header=b'{"a":1}', data=b"", length=2**64 - 1)
@example(header=b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": 3}', data=bytes(4), length=None)
def test_any_bytes(path, header, data, length):
    write(path, header, data, length)
    check(path)


@settings(max_examples=100, deadline=None)
@given(tensors=VALID, cut=st.integers(0, 200))
def test_whole_and_truncated_files(path, tensors, cut):
    sizes = {"F32": np.float32, "F16": np.float16, "U8": np.uint8}
    rng = np.random.RandomState(cut)
    save_file({str(index): rng.randint(0, 9, shape).astype(sizes[dtype]) for index, (dtype, shape) in enumerate(tensors)}, path)
    assert judge(path) is not None
    assert set(read(path).items()) <= set((judge(path) or {}).items())
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
        check(path)


def test_deeply_nested_headers(path):
    write(path, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")
    with pytest.raises(BadTensor, match="cannot be read"):
        TensorFile(path)


def test_a_file_that_shrinks_while_it_is_read(path):
    save_file({"a": np.arange(600, dtype=np.float32)}, path)
    with TensorFile(path) as file:
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(BadTensor, match="shorter"):
            file.read_rows(file.tensors["a"], 0, memoryview(bytearray(2400)))


def test_a_tensor_in_two_files_is_named(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": np.zeros(1, np.float32)}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(BadTensor, match=r"a is both in .*x\.safetensors and in .*y\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../secret.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "folder/x.safetensors"},
        {"a": "..safetensors/"},
        {"a": ".."},
        {"a": "x.bin"},
        {"a": ""},
        {"a": "x\0.safetensors"},
        {"a": 3},
        {"a": ["x.safetensors"]},
        {},
        [],
        None,
        "x.safetensors",
    ],
)
def test_an_index_that_leaves_its_folder_or_names_nothing(tmp_path, weight_map):
    (tmp_path / "inner").mkdir()
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "secret.safetensors")
    (tmp_path / "inner" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadTensor, match="index"):
        weight_files(tmp_path / "inner")
