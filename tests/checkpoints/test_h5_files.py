"""Keras's h5 files: the structure by a process of its own, the numbers without the HDF5 library."""

import signal
import sys

import h5py
import numpy as np
import pytest

from stable_diffusion_tf.checkpoints import h5_files
from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.checkpoints.tensors import open_tensors

KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.weights"


def write(path, change=lambda group: None):
    """A file of one layer with two weights; `change` edits its group before it is closed."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        group = file.create_group("dense")
        group.attrs["weight_names"] = [b"dense/kernel:0", b"dense/bias:0"]
        group.create_dataset("dense/kernel:0", data=KERNEL)
        group.create_dataset("dense/bias:0", data=np.ones(3, ">f2"))
        change(group)


def test_weights_are_read_in_keras_s_order(path):
    write(path)
    file = open_tensors(path)
    assert isinstance(file, h5_files.H5File)
    assert file.names == ["dense/dense/kernel:0", "dense/dense/bias:0"]
    assert file.shape(file.names[0]) == (2, 3)
    np.testing.assert_array_equal(file.read(file.names[0]), KERNEL)
    np.testing.assert_array_equal(file.read(file.names[0], slice(1, 2)), KERNEL[1:])
    np.testing.assert_array_equal(file.read(file.names[1]), np.ones(3, np.float16))


def test_weights_of_a_whole_saved_model_are_found(path):
    write(path)
    with h5py.File(path, "a") as file:
        file.create_group("model_weights").attrs["layer_names"] = file.attrs["layer_names"]
        del file.attrs["layer_names"]
        file.move("dense", "model_weights/dense")
    assert len(open_tensors(path).names) == 2


def replace(name, put):
    def change(group):
        del group[name]
        put(group)

    return change


def external_data(group):
    group.create_dataset("dense/bias:0", (3,), "f4", external=[("/etc/passwd", 0, 12)])


def odd_floats(group):
    """As other programs may describe them: 1, 2 and 3 in bfloat16's bits."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    space = h5py.h5s.create_simple((3,))
    weight = h5py.h5d.create(group.id, b"dense/bias:0", kind, space)
    weight.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array([1, 2, 3], "f4"))


def virtual(group):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (3,))
    group.create_virtual_dataset("dense/bias:0", layout)


BIAS = "dense/bias:0"
BAD = {
    "an external link": (
        replace(BIAS, lambda g: g.__setitem__(BIAS, h5py.ExternalLink("/etc/passwd", "/x"))),
        "link elsewhere (ExternalLink)",
    ),
    "a soft link": (
        replace(BIAS, lambda g: g.__setitem__(BIAS, h5py.SoftLink("/dense/dense/kernel:0"))),
        "link elsewhere (SoftLink)",
    ),
    "a group that is a link": (
        replace("dense", lambda g: g.__setitem__("dense", h5py.ExternalLink("other.h5", "/"))),
        "link elsewhere (ExternalLink)",
    ),
    "data in another file": (replace(BIAS, external_data), "in another file"),
    "a virtual dataset": (replace(BIAS, virtual), "virtual"),
    "compression": (
        replace(BIAS, lambda g: g.create_dataset(BIAS, data=np.ones(3), compression="gzip")),
        "compressed",
    ),
    "a petabyte": (
        replace(BIAS, lambda g: g.create_dataset(BIAS, (2**50,), "f4", chunks=(2**10,))),
        "compressed",
    ),
    "a petabyte without values": (
        replace(BIAS, lambda g: g.create_dataset(BIAS, (2**48,), "f4")),
        "has no values",
    ),
    "no values": (replace(BIAS, lambda g: g.create_dataset(BIAS, (3,), "f4")), "has no values"),
    "objects": (
        replace(BIAS, lambda g: g.create_dataset(BIAS, data=["a", "b"])),
        "no array of numbers",
    ),
    "a group for a weight": (replace(BIAS, lambda g: g.create_group(BIAS)), "is no array"),
    "a weight that is not there": (lambda g: g.__delitem__(BIAS), "has no dense/bias:0"),
    "a path out of its group": (
        lambda g: g.attrs.__setitem__("weight_names", [b"../dense/dense/bias:0"]),
        "has no ../dense/dense/bias:0",
    ),
    "an absolute path": (
        lambda g: g.attrs.__setitem__("weight_names", [b"/dense/dense/bias:0"]),
        "has no /dense/dense/bias:0",
    ),
    "a weight twice": (
        lambda g: g.attrs.__setitem__("weight_names", [b"dense/bias:0"] * 2),
        "twice",
    ),
    "no weights": (lambda g: g.attrs.__setitem__("weight_names", np.zeros(0)), "has no weights"),
    "no list of weights": (lambda g: g.attrs.__delitem__("weight_names"), "no weights of Keras 2"),
    "no list of layers": (
        lambda g: g.file.attrs.__delitem__("layer_names"),
        "no weights of Keras 2",
    ),
    "floats of another kind": (replace("dense/bias:0", odd_floats), "floats of a kind"),
    "a list that is a number": (lambda g: g.attrs.__setitem__("weight_names", 5), "damaged"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_plain_is_refused(path, h5_at_once, what):
    change, message = BAD[what]
    write(path, change)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    assert message in str(caught.value)


def test_an_error_of_the_process_is_passed_on(path):
    write(path, BAD["an external link"][0])
    with pytest.raises(CheckpointError, match="ExternalLink"):
        open_tensors(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        open_tensors(path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", f"{-signal.SIGSEGV}"),
        ("import time; time.sleep(60)", "took too long"),
        ("print('no json')", "gave up"),
        ("print('[1]')", "damaged"),
        ("""print('{"weights": [["a", "<f4", [1099511627776], 0]]}')""", "is not in the file"),
        ("""print('{"weights": [["a", "<f4", [3], -8]]}')""", "is not in the file"),
        ("""print('{"weights": [["a", "<f4", [-3], 0]]}')""", "is not in the file"),
        ("""print('{"weights": [["a", "|O", [1], 0]]}')""", "no array of numbers"),
    ],
)
def test_a_process_that_fails_costs_only_an_error(path, tmp_path, monkeypatch, code, message):
    (tmp_path / "broken_structure.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(h5_files, "STRUCTURE", "broken_structure")
    monkeypatch.setattr(h5_files, "SECONDS", 2)
    write(path)
    with pytest.raises(CheckpointError, match=message):
        open_tensors(path)


def test_the_process_imports_nothing_from_where_the_user_is(path, tmp_path, monkeypatch):
    for name in ("h5py", "json", "stable_diffusion_tf"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    write(path)
    assert len(open_tensors(path).names) == 2
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")
def test_the_process_has_little_memory_and_writes_nothing(path, tmp_path, monkeypatch):
    (tmp_path / "greedy.py").write_text(
        "from stable_diffusion_tf.checkpoints import h5_structure\n"
        "h5_structure._limit()\n"
        "try:\n    bytearray(2**29)\nexcept MemoryError:\n"
        f"    try:\n        open({str(tmp_path / 'made')!r}, 'w').write('x' * 10**6)\n"
        '    except OSError:\n        print(\'{"error": "neither"}\')\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(h5_files, "STRUCTURE", "greedy")
    write(path)
    with pytest.raises(CheckpointError, match="neither"):
        open_tensors(path)
