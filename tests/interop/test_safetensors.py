"""Safetensors files: the format as others read and write it, and damage named instead of loaded."""

import json
import struct

import numpy as np
import pytest
from interop.builders import BF16, assert_same, read
from safetensors.numpy import load_file, save_file

from mimo_jax.interop.safetensors import DTYPES, INDEX, SINGLE, Reader, SafetensorsError, Writer, save

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.normal(size=(7, 5)).astype(np.float32),
    "b.c": RNG.normal(size=(3, 4, 2)).astype(BF16),
    "one": np.array([True]),
    "scalar": np.array(2.5, np.float16),
    "empty": np.zeros((0, 4), np.int64),
}


def test_files_are_those_of_the_reference_library(tmp_path):
    save(tmp_path, TENSORS)
    assert_same(load_file(tmp_path / SINGLE), TENSORS)
    (tmp_path / "theirs").mkdir()
    save_file(TENSORS, tmp_path / "theirs" / SINGLE, metadata={"format": "pt"})
    assert_same(read(tmp_path / "theirs"), TENSORS)


def test_every_dtype_survives(tmp_path):
    tensors = {name: RNG.integers(0, 2, (5, 3)).astype(dtype) for name, dtype in DTYPES.items()}
    save(tmp_path, tensors)
    assert_same(read(tmp_path), tensors)


def test_shards_are_at_most_as_large_as_asked_and_joined_by_an_index(tmp_path):
    tensors = {f"t{i}": RNG.normal(size=(10, 10)).astype(np.float32) for i in range(7)}
    save(tmp_path, tensors, shard_bytes=1000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2800 and set(index["weight_map"]) == set(tensors)
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert_same(read(tmp_path), tensors)
    for file in set(index["weight_map"].values()):
        assert sum(x.nbytes for x in load_file(tmp_path / file).values()) <= 1000


def test_rows_can_be_read_and_written_in_any_order(tmp_path):
    x = RNG.normal(size=(9, 2, 3)).astype(np.float32)
    with Writer(tmp_path, {"first": (np.dtype(np.int8), (2,)), "x": (x.dtype, x.shape)}, 10**9) as writer:
        for start, stop in ((6, 9), (0, 2), (2, 6)):
            writer.write("x", x[start:stop], start)
        with pytest.raises(SafetensorsError, match=r"tensor x: expected float32 \(9, 2, 3\), got float64"):
            writer.write("x", x.astype(np.float64))
    with Reader(tmp_path) as reader:
        np.testing.assert_array_equal(reader.read("x", 3, 7), x[3:7])
        np.testing.assert_array_equal(reader.read("first"), [0, 0])


def _file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _header(**tensors) -> bytes:
    return json.dumps({n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in tensors.items()}).encode()


DAMAGED = {
    "no header": b"abc",
    "a header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "no JSON": _file(b"{nonsense"),
    "JSON nested too deep": _file(b"[" * 100_000),
    "an infinite offset": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}', bytes(4)),
    "an unknown dtype": _file(_header(a=("F12", [1], [0, 4])), bytes(4)),
    "a shape that does not fill its bytes": _file(_header(a=("F32", [2], [0, 4])), bytes(4)),
    "a negative shape": _file(_header(a=("F32", [-1, -1], [0, 4])), bytes(4)),
    "a gap": _file(_header(a=("F32", [1], [4, 8])), bytes(8)),
    "an overlap": _file(_header(a=("F32", [2], [0, 8]), b=("F32", [1], [4, 8])), bytes(8)),
    "bytes that are missing": _file(_header(a=("F32", [2], [0, 8])), bytes(7)),
    "bytes that nobody owns": _file(_header(a=("F32", [1], [0, 4])), bytes(5)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    (tmp_path / SINGLE).write_bytes(DAMAGED[damage])
    with pytest.raises(SafetensorsError, match=SINGLE):
        Reader(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    save(tmp_path, {f"t{i}": np.ones(10, np.float32) for i in range(4)}, shard_bytes=80)
    index = json.loads((tmp_path / INDEX).read_text())

    def refused(message, **weight_map):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | weight_map}))
        with pytest.raises((SafetensorsError, FileNotFoundError), match=message):
            Reader(tmp_path)

    refused("tensor more: in the index", more="model-00001-of-00002.safetensors")
    refused("tensor t0: the index has it in", t0="model-00002-of-00002.safetensors")
    refused("names of files beside it", t0="../elsewhere.safetensors")
    refused("No such file", t0="gone.safetensors")
    for name in (7, None, ["model-00001-of-00002.safetensors"]):
        refused(f"{INDEX}: .*expected names of files, got", t0=name)
    (tmp_path / INDEX).write_text("[" * 100_000)
    with pytest.raises(SafetensorsError, match=f"{INDEX}: expected a JSON object with a weight_map"):
        Reader(tmp_path)
