import json
import math
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from stable_diffusion_tf.checkpoints.readers import (
    MAX_JSON,
    CheckpointError,
    SafetensorsFile,
    read_json,
    save_safetensors,
)
from stable_diffusion_tf.checkpoints.tensors import ShardedFile, open_tensors

TENSORS = {
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float16),
    "matrix": np.arange(6, dtype=np.float64).reshape(2, 3),
    "half": np.array([1.5, -2], ml_dtypes.bfloat16),
    "ids": np.array([[1, 2]], np.int64),
    "flags": np.array([True, False]),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some.safetensors"
    save_safetensors(TENSORS, path, {"made": "here"})
    return path


def packed(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_what_was_saved_is_read(path):
    file = SafetensorsFile(path)
    assert set(file.names) == set(TENSORS)
    assert file.metadata == {"made": "here"}
    for name, tensor in TENSORS.items():
        assert (file.shape(name), file.dtype(name)) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(file.read(name), tensor)
        for rows in (slice(1, 2), slice(1, None)) if tensor.ndim else ():
            np.testing.assert_array_equal(file.read(name, rows), tensor[rows])


def test_a_tensor_that_is_not_contiguous_is_saved_as_it_reads(path):
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_safetensors({"other": tensor}, path)
    np.testing.assert_array_equal(SafetensorsFile(path).read("other"), tensor)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
        (b"PK\x03\x04\x14\x00\x00\x00\x00\x00", "not a safetensors file"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00", "not a safetensors file"),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "not a safetensors file"),
        (b'{"error": "gone"}', "JSON"),
        (packed({"a": entry([2], 0, 8)}, b"1234"), "truncated: it has .* of at least"),
        (packed({"a": entry([1], 0, 4)}, b"12345678"), "4 bytes after its last tensor"),
        (struct.pack("<Q", 50) + b"{}", "truncated"),
        (packed(b" {}"), "does not begin"),
        (packed(b"[]"), "does not begin"),
        (packed(b'{"a": 1'), "damaged"),
        (packed(b'{"\xff": 1}'), "utf-8"),
        (packed(b'{"\\ud800": {}}'), "surrogate"),
        (packed(b"{" + b'"a":{' * 100_000), "too deeply"),
        (packed({"a": entry([], 0, 4)}, b"1234").replace(b'"a"', b'"b"').replace(b"[]", b"-0"),
         "-0"),
        (packed(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "twice"),
        (packed({"a": {"dtype": "F32"}}), "not described"),
        (packed({"a": entry([1], 0, 4, "F12")}, b"1234"), "unknown dtype 'F12'"),
        (packed({"a": entry([1], 0, 4, ["F32"])}, b"1234"), "unknown dtype"),
        (packed({"a": entry([True], 0, 4)}, b"1234"), "impossible shape"),
        (packed({"a": entry([-1, -1], 0, 4)}, b"1234"), "impossible shape"),
        (packed({"a": entry([0, 2**63, 4], 0, 0)}), "impossible shape"),
        (packed({"a": entry([1] * 40, 0, 4)}, b"1234"), "impossible shape"),
        (packed({"a": entry([1], 4, 0)}, b"1234"), "impossible offsets"),
        (packed({"a": entry([2], 0, 4)}, b"1234"), "has 4 bytes"),
        (packed({"a": entry([1], 4, 8)}, b"12345678"), "begins at byte 4, not 0"),
        (packed({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"12345678"), "begins at byte 4"),
        (packed({"__metadata__": {"a": 1}}), "not text"),
        (packed({"__metadata__": []}), "not an object"),
    ],
)  # fmt: skip
def test_each_damage_is_named(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors.*{message}"):
        SafetensorsFile(path)


def test_a_header_larger_than_any_model_s_is_named(tmp_path):
    path = tmp_path / "some"
    save_file({"a": np.ones(2)}, path, {"tags": "x" * MAX_JSON})
    with pytest.raises(CheckpointError, match=r"a header of 4194\d+ bytes; at most 4194304"):
        open_tensors(path)


def test_no_prefix_of_a_file_is_a_file(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is missing"):
        SafetensorsFile(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        SafetensorsFile(tmp_path)


GOOD = packed(
    {
        "__metadata__": {"format": "np"},
        "a": entry([2, 1], 0, 8),
        "b": entry([], 8, 10, "F16"),
        "c": entry([0], 10, 10, "I64"),
    },
    bytes(10),
)
SPLICES = [b"", b"0", b"1", b"-", b"9" * 20, b'"', b",", b"[", b"}", b"null", b"true", b"1e1",
           b".0", b" ", b"\n", b"\xc3", b"\\ud800", b"F16", b'"a":', b"NaN", b"\x00"]  # fmt: skip


@settings(max_examples=400)
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(SPLICES)),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_nothing_is_accepted_that_the_reference_refuses(tmp_path_factory, splices, right_length):
    content = GOOD
    for position, removed, added in splices:
        content = content[:position] + added + content[position + removed :]
    if right_length:  # so that damage within the header is reached
        content = struct.pack("<Q", max(len(content) - 18, 0)) + content[8:]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        deserialize(content)
    except SafetensorError:
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


@pytest.fixture
def sharded(tmp_path):
    names = sorted(TENSORS)
    shards = {"one.safetensors": names[:3], "two.safetensors": names[3:]}
    for shard, held in shards.items():
        save_safetensors({name: TENSORS[name] for name in held}, tmp_path / shard)
    places = {name: shard for shard, held in shards.items() for name in held}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


def test_shards_read_as_one_file(sharded):
    file = open_tensors(sharded)
    assert isinstance(file, ShardedFile) and set(file.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (file.shape(name), file.dtype(name)) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(file.read(name), tensor)


def test_a_missing_shard_is_named(sharded):
    (sharded.parent / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"two\.safetensors is missing"):
        open_tensors(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"scalar": "one.safetensors"}, "disagree about"),
        ({"scalar": "../one.safetensors"}, "not a file beside"),
        ({"scalar": ".."}, "not a file beside"),
        (["scalar"], "weight_map"),
        ({"scalar": 1}, "weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(sharded, weight_map, message):
    sharded.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_tensors(sharded)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": 1, "a": 2}', b"<html>", b'{"a": 1,}'])
def test_json_that_is_no_plain_object_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_json(path)
    assert "looks like JSON" not in str(caught.value)


def test_only_a_header_of_weights_knows_no_infinity(tmp_path):
    path = tmp_path / "some"
    path.write_bytes(b'{"least": -Infinity}')
    assert read_json(path) == {"least": -math.inf}
    for constant in (b"NaN", b"Infinity", b"-Infinity"):
        path.write_bytes(packed(b'{"__metadata__": {"a": ' + constant + b"}}"))
        with pytest.raises(CheckpointError, match=f"{constant.decode()} is not JSON"):
            SafetensorsFile(path)
