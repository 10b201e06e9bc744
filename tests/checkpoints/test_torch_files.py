"""PyTorch's files without PyTorch; what is more than data is refused by name before it runs."""

import os
import pickle
import re
import struct
import sys
import zipfile
from io import BytesIO
from types import SimpleNamespace

import layouts
import ml_dtypes
import numpy as np
import pytest
from layouts import integer, said, storage, tensor, text

from stable_diffusion_tf.checkpoints.fit import Match
from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.checkpoints.tensors import open_tensors
from stable_diffusion_tf.checkpoints.torch_files import TorchFile

TENSORS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2], np.float16),
    "scalar": np.array(3.5, np.float64),
    "empty": np.zeros((0, 4), np.float32),
    "ids": np.array([[1, 2]], np.int64),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_tensors_are_read(tmp_path, old):
    path = tmp_path / "model.ckpt"
    layouts.write_ckpt(path, TENSORS, old)
    file = open_tensors(path)
    assert isinstance(file, TorchFile)
    assert file.names == list(TENSORS)
    for name, value in TENSORS.items():
        assert (file.shape(name), file.dtype(name)) == (value.shape, value.dtype)
        np.testing.assert_array_equal(file.read(name), value)


@pytest.mark.parametrize("name", ["torch_zip.ckpt", "torch_legacy.ckpt"])
def test_what_pytorch_itself_wrote_is_read(name):
    """{"state_dict": …, "global_step": 5}, saved by torch 2.13."""
    file = open_tensors(layouts.synth.DATA / name)
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = {
        "a": matrix,
        "b": np.ones(3, np.float16),
        "c": matrix.T,  # shares nothing with a, but has its strides
        "d": np.array(3),
        "e": np.zeros((0, 4), np.float32),
        "f": np.ones(2, ml_dtypes.bfloat16),
        "p": np.ones(2, np.float32),  # a parameter
    }
    assert file.names == list(expected)
    for tensor_name, value in expected.items():
        assert file.dtype(tensor_name) == value.dtype
        np.testing.assert_array_equal(file.read(tensor_name), value)


def table(items):
    return b"\x80\x02}(" + items + b"u."


def one(what):
    """A checkpoint with one good tensor, and something else beside it."""
    return table(text("w") + tensor("<f4", "0", (2,)) + text("x") + what)


def archive(data, storages=None):
    return layouts.zipped(data, {"0": bytes(8)} if storages is None else storages)


def test_tensors_may_share_a_storage(tmp_path):
    items = text("a") + tensor("<f4", "0", (2, 2), count=6, offset=1, strides=(3, 1))
    items += text("b") + tensor("<f4", "0", (5,), count=6, strides=(0,))
    path = tmp_path / "shared.pt"
    path.write_bytes(archive(table(items), {"0": np.arange(6, dtype=np.float32).tobytes()}))
    np.testing.assert_array_equal(open_tensors(path).read("a"), [[1, 2], [4, 5]])
    np.testing.assert_array_equal(open_tensors(path).read("a", slice(1, 2)), [[4, 5]])
    np.testing.assert_array_equal(open_tensors(path).read("b"), np.zeros(5))


def test_rows_that_lie_in_each_other_are_not_read_alone(tmp_path):
    items = text("rows") + tensor("<f4", "0", (3, 2), count=6, strides=(2, 1))
    items += text("turned") + tensor("<f4", "0", (2, 3), count=6, strides=(1, 2))
    items += text("same") + tensor("<f4", "0", (2, 3), count=6, strides=(0, 1))
    path = tmp_path / "turned.pt"
    path.write_bytes(archive(table(items), {"0": np.arange(6, dtype=np.float32).tobytes()}))
    file = open_tensors(path)
    assert [file.by_rows(name) for name in file.names] == [True, False, False]
    for name in file.names:
        np.testing.assert_array_equal(file.read(name, slice(1, 2)), file.read(name)[1:2])
        variable = SimpleNamespace(dtype="float32")
        match = Match(variable, file, name, file.shape(name), (0, 1))
        np.testing.assert_array_equal(match.read(), file.read(name))


def test_an_axis_of_one_element_may_have_any_stride(tmp_path):
    path = tmp_path / "far.pt"
    far = tensor("<f4", "0", (1, 2), strides=(2**31 - 1, 1)).replace(
        integer(2**31 - 1), b"\x8a\x08" + (2**63 - 1).to_bytes(8, "little")
    )
    path.write_bytes(archive(table(text("a") + far), {"0": np.ones(2, np.float32).tobytes()}))
    np.testing.assert_array_equal(open_tensors(path).read("a"), [[1, 1]])


def test_the_trainer_s_notes_are_not_rebuilt(tmp_path):
    """As in CompVis's own files: a class for a key, a NumPy number, an old string."""
    note = said("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    number = said("numpy.core.multiarray", "scalar") + said("numpy", "dtype")
    number += b"(" + text("f8") + integer(0) + integer(1) + b"tR(" + integer(3) + text("<")
    number += b"tb" + said("_codecs", "encode") + b"(" + text("x") + text("latin1") + b"tR\x86R"
    path = tmp_path / "notes.ckpt"
    path.write_bytes(archive(one(b"}(" + note + b"}" + text("best") + number + b"s" + b"u")))
    assert open_tensors(path).names == ["w"]


# Every way out of an allow-list that we know of. Each says the file it would have made, or a name.
CALL = b"(" + text("touch escaped") + b"tR"
MODULES = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"),
    ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "__import__"),
    ("__builtin__", "eval"), ("importlib", "import_module"), ("runpy", "run_path"),
    ("pickle", "loads"), ("_pickle", "loads"), ("marshal", "loads"), ("types", "FunctionType"),
    ("shutil", "rmtree"), ("webbrowser", "open"), ("socket", "socket"), ("ctypes", "CDLL"),
    ("operator", "attrgetter"), ("functools", "partial"), ("copyreg", "_reconstructor"),
    ("torch.hub", "load"), ("torch.jit", "load"), ("torch", "load"),
    ("torch.serialization", "load"),
    ("torch.jit.unsupported_tensor_ops", "execWrapper"), ("torch.storage", "_load_from_bytes"),
    ("torch.utils._config_module", "load_config"), ("torch._dynamo.guards", "GuardBuilder.get"),
    ("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression"),
    ("torch.distributed.rpc.internal", "_run_function"), ("torch.collect_env", "run"),
    ("torch.utils.bottleneck.__main__", "run_cprofile"), ("torch", "_utils._rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch._utils", "_rebuild_tensor_v3"),
    ("numpy.f2py.crackfortran", "getlincoef"), ("numpy.testing._private.utils", "runstring"),
    ("numpy", "load"), ("numpy.core.multiarray", "_reconstruct"), ("cProfile", "run"),
    ("idlelib.pyshell", "ModifiedInterpreter.runcommand"), ("profile", "run"), ("pdb", "run"),
    ("timeit", "timeit"), ("trace", "Trace.run"),
    ("code", "InteractiveInterpreter.runcode"), ("bdb", "Bdb.run"), ("doctest", "debug_script"),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start"), ("pip", "main"),
    ("lib2to3.pgen2.pgen", "ParserGenerator.make_label"), ("logging.config", "_resolve"),
    ("ensurepip", "_run_pip"), ("venv", "create"), ("pty", "spawn"), ("commands", "getoutput"),
    ("collections", "OrderedDict.fromkeys"), ("collections", "namedtuple"), ("_io", "FileIO"),
    ("transformers.utils.generic", "__builtins__"), ("keras.saving", "load_model"), ("", ""),
]  # fmt: skip
OPCODES = {
    "STACK_GLOBAL": text("os") + text("system") + b"\x93" + CALL,
    "STACK_GLOBAL of spaces": text("torch._utils _rebuild_tensor_v2") + text("") + b"\x93" + CALL,
    "STACK_GLOBAL of a number": integer(1) + text("system") + b"\x93" + CALL,
    "STACK_GLOBAL from the memo": text("os") + b"q\x01" + text("system") + b"q\x020h\x01h\x02\x93",
    "INST": b"(" + text("touch escaped") + b"ios\nsystem\n",
    "OBJ": b"(" + said("os", "system") + text("touch escaped") + b"o",
    "OBJ of what is allowed": b"(" + said("collections", "OrderedDict") + b"o",
    "NEWOBJ": said("os", "_wrap_close") + b")\x81",
    "NEWOBJ_EX": said("collections", "OrderedDict") + b")}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pos.system\n",
    "persistent id of nothing": b"NQ",
    "persistent id of a call": b"(" + text("storage") + said("torch._utils", "_rebuild_parameter")
    + text("0") + text("cpu") + integer(2) + b"tQ",
    "persistent id with a view": b"(" + text("storage") + said("torch", "FloatStorage") + text("0")
    + text("cpu") + integer(2) + text("view") + b"tQ",
    "persistent id with a path": storage("<f4", "../../w", 2),
    "the same storage twice": storage("<f2", "0", 2),
    "REDUCE of a string": text("os.system") + CALL,
    "REDUCE of a type": said("torch", "FloatStorage") + CALL,
    "REDUCE of a tensor": tensor("<f4", "0", (2,)) + CALL,
    "REDUCE without a tuple": said("collections", "OrderedDict") + text("ab") + b"R",
    "OrderedDict of text": said("collections", "OrderedDict") + b"(" + text("ab") + b"tR",
    "OrderedDict of three": said("collections", "OrderedDict") + b"(](NNNtatR",
    "rebuild without arguments": said("torch._utils", "_rebuild_tensor_v2") + b")R",
    "rebuild of text": said("torch._utils", "_rebuild_tensor_v2") + b"(" + text("x") * 4 + b"tR",
    "rebuild of a number": said("torch._utils", "_rebuild_parameter") + b"(NNNtR",
    "a tensor that is negated when it is read": said("torch._utils", "_rebuild_tensor_v2") + b"("
    + storage("<f4", "0", 2) + integer(0) + b"(" + integer(2) + b"t(" + integer(1) + b"t\x89N}"
    + text("neg") + b"\x88stR",
    "a tensor beyond its storage": tensor("<f4", "0", (2,), offset=1, count=2),
    "a negative offset": tensor("<f4", "0", (2,), offset=-1),
    "negative strides": tensor("<f4", "0", (2,), strides=(-1,)),
    "a shape of a petabyte": tensor("<f4", "0", (2**30, 2**30), count=2),
    "more sizes than NumPy has": tensor("<f4", "0", (1,) * 99, count=2),
    "BUILD of a tensor": tensor("<f4", "0", (2,)) + b"}" + text("shape") + b"Nsb",
    "BUILD of a function": said("torch._utils", "_rebuild_tensor_v2") + b"}" + text("x") + b"Nsb",
    "BUILD of a list": b"]}" + text("append") + b"Nsb",
    "__setstate__ in a dict": b"}" + text("__setstate__") + said("os", "system") + b"s"
    + text("touch escaped") + b"b",
    "a key that is a tuple of tuples": b"})" + b"\x85" * 5000 + b"Ns",
    "a key that is a list": b"}]Ns",
    "a key that hashes like others": b"}\x8a\x10" + b"\xff" * 15 + b"\x01Ns",
    "items set on a list": b"]" + text("a") + b"Ns",
    "items appended to a tensor": tensor("<f4", "0", (2,)) + b"Na",
    "a set": b"\x8f",
    "a bytearray": b"\x96" + struct.pack("<Q", 2**62),
    "LONG4 of 2 GiB": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a negative LONG4": b"\x8b" + struct.pack("<i", -1),
    "BINUNICODE8 of an exabyte": b"\x8d" + struct.pack("<Q", 2**60),
    "BINBYTES8 of 16 exabytes": b"\x8e" + struct.pack("<Q", 2**64 - 1),
    "BINSTRING of -1": b"T" + struct.pack("<i", -1),
    "a frame of an exabyte": b"\x95" + struct.pack("<Q", 2**60),
    "LONG of a million digits": b"L" + b"9" * 10**6 + b"L\n",
    "a memo that is not there": b"h\x63",
    "a negative memo": b"p-1\n0g-2\n",
    "a stack that is empty": b"0" * 50,
    "a mark that is not there": b"tttttt",
    "an unknown opcode": b"\xff",
    "a truncated opcode": b"X\xff",
}  # fmt: skip


@pytest.fixture
def nothing_happens(tmp_path, monkeypatch):
    """No file is made, and nothing is imported."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    assert sorted(os.listdir(tmp_path)) == ["bad.ckpt"]
    assert set(sys.modules) == before


def refused(data, path="bad.ckpt"):
    with open(path, "wb") as file:
        file.write(data)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    return str(caught.value)


@pytest.mark.parametrize(("module", "name"), MODULES)
def test_other_names_are_refused_by_name(nothing_happens, module, name):
    for data in (
        one(said(module, name) + CALL),
        one(text(module) + text(name) + b"\x93" + CALL),
        said(module, name) + CALL + b".",
    ):
        message = refused(archive(data))
        assert f"it names {module}.{name}, which is no tensor" in message
        assert "Nothing in it was run" in message
    assert f"{module}.{name}" in refused(layouts.legacy(one(said(module, name) + CALL), {}, {}))


@pytest.mark.parametrize("what", OPCODES)
def test_other_opcodes_and_odd_arguments_are_refused(nothing_happens, what):
    message = refused(archive(one(OPCODES[what])))
    assert "Nothing in it was run" in message and len(message) < 500


def test_large_memo_indices_take_no_memory(tmp_path):
    path = tmp_path / "memo.pt"
    path.write_bytes(archive(one(b"Nr\xff\xff\xff\x7fj\xff\xff\xff\x7f0")))
    assert open_tensors(path).names == ["w"]


def test_containers_in_themselves_and_in_each_other_are_harmless(tmp_path):
    path = tmp_path / "laughs.pt"
    laughs = b"(]q\x00h\x00a" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
    )
    path.write_bytes(archive(one(laughs + b"l")))
    assert open_tensors(path).names == ["w"]


def test_reading_is_bounded(nothing_happens):
    assert "more than 400000 steps" in refused(archive(one(b"N0" * 300_000)))
    pairs = b"](" + b"(NNt" * 50_000 + b"eq\x01"
    again = said("collections", "OrderedDict") + b"q\x02(h\x01tR" + b"0h\x02(h\x01tR" * 50
    assert "more than 400000 steps" in refused(archive(one(pairs + again)))
    encode = b"c_codecs\nencode\nq\x00(" + b"N" * 50_000 + b"tq\x010"
    assert "more than 400000 steps" in refused(archive(one(encode + b"0h\x00h\x01R" * 50)))
    assert "more than any checkpoint's" in refused(archive(one(b"") + bytes(17 * 2**20)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps([1, 2]), "a Python pickle, not a file of PyTorch"),
        (archive(pickle.dumps([1, 2], 2)), "it holds a list, not tensors"),
        (archive(pickle.dumps({"a": 1}, 2)), "no tensors with names"),
        (archive(table(integer(1) + tensor("<f4", "0", (2,)))), "names are not text"),
        (archive(table(text("\n\x1b[2J") + tensor("<f4", "0", (2,)))), "names are not text"),
        (archive(one(b"N"), {}), "does not hold the storage '0'"),
        (archive(one(b"N"), {"0": bytes(7)}), "does not hold the storage '0'"),
        (archive(one(b"N"))[:-1], "is cut off"),
        (archive(one(b"N"))[:200], "is cut off"),
        (archive(one(b"N")).replace(b"data.pkl", b"else.pkl"), "PyTorch did not write"),
    ],
)
def test_files_of_another_kind_are_named(nothing_happens, data, message):
    assert message in refused(data)


def made(*entries, compression=zipfile.ZIP_STORED):
    file = BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        for name, data in entries:
            zipped.writestr(name, data)
    return file.getvalue()


GOOD = one(b"N")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (made(("a/data.pkl", GOOD), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (made(("a/data.pkl", GOOD), ("b/data.pkl", GOOD)), "PyTorch did not write"),
        (made(("a/data.pkl", GOOD), ("a/constants.pkl", b"")), "TorchScript"),
        (made(("a/b.zip", made(("a/data.pkl", GOOD)))), "PyTorch did not write"),
        (made(("a/byteorder", b"big"), ("a/data.pkl", GOOD)), "big-endian"),
        (b"PK\x03\x04" + archive(GOOD), "zip directory is damaged"),
        (archive(GOOD).replace(b"archive/data.pkl", b"archive/evil.pkl", 1), "not what the direc"),
    ],
)
def test_zip_archives_that_do_not_agree_with_themselves_are_refused(nothing_happens, data, message):
    assert re.search(message, refused(data))


def edited(offset, layout, value, where):
    """An archive with a number changed in the record that begins with `where`."""
    data = bytearray(archive(GOOD))
    struct.pack_into(layout, data, data.index(where) + offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        edited(22, "<I", 5, b"PK\x03\x04"),  # length in the local header
        edited(8, "<H", 8, b"PK\x03\x04"),  # compression there
        edited(24, "<I", 5, b"PK\x01\x02"),  # length in the directory
        edited(42, "<I", 7, b"PK\x01\x02"),  # place there
        edited(42, "<I", 2**32 - 2, b"PK\x01\x02"),
        edited(28, "<H", 60_000, b"PK\x01\x02"),  # the name's length
        edited(30, "<H", 60_000, b"PK\x01\x02"),  # the extra fields' length
        edited(8, "<H", 1, b"PK\x01\x02"),  # encrypted
        edited(10, "<H", 65_000, b"PK\x05\x06"),  # how many entries
        edited(12, "<I", 2**32 - 1, b"PK\x05\x06"),  # the directory's length
        edited(16, "<I", 2**32 - 1, b"PK\x05\x06"),  # its place
        edited(20, "<H", 5, b"PK\x05\x06"),  # a comment's length
    ],
)
def test_zip_headers_that_lie_are_refused(nothing_happens, data):
    refused(data)


def test_legacy_files_that_are_cut_or_lie_are_refused(tmp_path):
    sizes = {str(i): value.itemsize for i, value in enumerate(TENSORS.values())}
    whole = layouts.legacy(layouts.described(TENSORS), layouts.contents(TENSORS), sizes)
    path = tmp_path / "bad.ckpt"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_tensors(path)
    with pytest.raises(CheckpointError, match="is truncated"):
        path.write_bytes(whole[:-1])
        open_tensors(path)
    path.write_bytes(whole.replace(b"little_endian", b"middle_endian"))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_tensors(path)
