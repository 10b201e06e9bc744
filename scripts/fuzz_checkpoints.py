"""Feeds damaged checkpoints to the readers and counts what they make of them.

    python scripts/fuzz_checkpoints.py --count 10000        # that many of each kind

Each case is a good small file, changed at random: safetensors headers, PyTorch's zip and legacy
files and the pickles in them, Keras's h5. A reader may open it or raise CheckpointError. Anything
else is a failure: another exception, more than 5 seconds, 200 MB, an import, a file made, a tensor
that safetensors' own reader reads otherwise. HDF5's library is the exception: it may crash or hang
in the process that is there for it, which is then counted. Exit status 1 if anything failed.
"""

import codecs
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import h5py
import numpy as np
import safetensors.numpy
from fuzzing import finish, fuzz, most_memory, mutated

from stable_diffusion_tf.checkpoints import h5_files, h5_structure
from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.checkpoints.tensors import open_tensors

DATA = Path(__file__).parent.parent / "tests" / "data"
MEGABYTES = 200
JSON_PIECES = (b"0", b"1", b"-", b"9" * 20, b'"', b",", b"[", b"]", b"{", b"}", b"null", b"true")
JSON_PIECES += (b"1e1", b".0", b" ", b"\xc3", b"\\ud800", b"F16", b"I64", b'"a":', b"NaN", b"\0")
PICKLE_PIECES = (
    b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"R", b"b", b"\x81", b"\x92", b"i", b"o",
    b"(", b")", b"]", b"}", b"t", b"e", b"u", b"s", b"a", b"0", b"2", b"Q", b".", b"\x85" * 50,
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"h\x00", b"q\x05",
    b"\x8d" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"Pos\n", b"\x82\x01",
)  # fmt: skip


def safetensors_files(rng: random.Random) -> bytes:
    good = safetensors.numpy.save(
        {
            "a": np.arange(6, dtype=np.float32).reshape(2, 3),
            "b": np.zeros((), np.float16),
            "c": np.zeros((0, 4), np.int64),
        },
        {"format": "np"},
    )
    length = int.from_bytes(good[:8], "little")
    header, data = good[8 : 8 + length], good[8 + length :]
    header = mutated(header, JSON_PIECES, rng)
    start = struct.pack("<Q", len(header)) if rng.random() < 0.9 else mutated(good[:8], (), rng)
    return start + header + data


def torch_files(rng: random.Random) -> bytes:
    """A whole file changed, or the pickle in a zip archive that is itself in order."""
    if rng.random() < 0.3:
        return mutated((DATA / "torch_legacy.ckpt").read_bytes(), PICKLE_PIECES, rng)
    if rng.random() < 0.2:
        return mutated((DATA / "torch_zip.ckpt").read_bytes(), (), rng)
    made = io.BytesIO()
    with (
        zipfile.ZipFile(DATA / "torch_zip.ckpt") as good,
        zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name in good.namelist():
            data = good.read(name)
            if name.endswith("data.pkl"):
                if rng.random() < 0.2:  # opcodes of a later protocol
                    data = pickle.dumps({"a": [1, (2.5, None)], "b": {"c": b"d"}}, 5)
                data = mutated(data, PICKLE_PIECES, rng)
            archive.writestr(name, data)
    return made.getvalue()


def h5_file() -> bytes:
    made = io.BytesIO()
    with h5py.File(made, "w") as file:
        file.attrs["layer_names"] = [b"input", b"dense", b"conv"]
        file.create_group("input").attrs["weight_names"] = np.zeros(0, "S1")
        for layer in ("dense", "conv"):
            group = file.create_group(layer)
            group.attrs["weight_names0"] = [f"{layer}/kernel:0".encode()]
            group.attrs["weight_names1"] = [f"{layer}/bias:0".encode()]
            group.create_dataset(f"{layer}/kernel:0", data=np.ones((3, 4), np.float32))
            group.create_dataset(f"{layer}/bias:0", data=np.ones(4, np.float32))
    return made.getvalue()


def h5_files_of(good: bytes) -> Callable[[random.Random], bytes]:
    return lambda rng: good[:8] + mutated(good[8:], (b"\xff" * 8, b"SNOD", b"HEAP", b"TREE"), rng)


def forked_structure(path: Path) -> dict:
    """As `h5_files.read_structure`, in a fork of this process: that takes minutes, not hours."""
    here, there = os.pipe()
    if not (child := os.fork()):
        try:
            h5_structure._limit()
            try:
                answer = {"weights": h5_structure.structure(str(path))}
            except Exception as error:
                answer = {"error": str(error)}
            os.write(there, json.dumps(answer).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if not said:
        crashes[f"h5 process: {os.waitstatus_to_exitcode(status)}"] += 1
        raise ValueError("the HDF5 library gave up on it")
    answer = json.loads(said)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def read(path: Path) -> dict[str, np.ndarray]:
    file = open_tensors(path)
    return {name: file.read(name) for name in file.names if np.prod(file.shape(name)) < 10**6}


def read_as_the_reference(path: Path) -> None:
    tensors = read(path)
    if not same_as_the_reference(path.read_bytes(), tensors):
        raise AssertionError("safetensors reads it otherwise")


def same_as_the_reference(content: bytes, tensors: dict[str, np.ndarray]) -> bool:
    try:
        reference = safetensors.numpy.load(content)
    except safetensors.SafetensorError:
        return False
    return reference.keys() == tensors.keys() and all(
        value.dtype == tensors[name].dtype and value.tobytes() == tensors[name].tobytes()
        for name, value in reference.items()
    )


crashes: Counter[str] = Counter()


@click.command(help=__doc__)
@click.option("--count", default=300, show_default=True, help="Files of a kind; half of h5.")
@click.option("--seed", default=0, show_default=True)
def main(count: int, seed: int) -> None:
    h5_files.read_structure = forked_structure
    kinds = {
        "safetensors": (safetensors_files, read_as_the_reference, count),
        "torch": (torch_files, read, count),
        "h5": (h5_files_of(h5_file()), read, count // 2),
    }
    for make, *_ in kinds.values():  # what is imported once, is before the first case
        make(random.Random(0))
    codecs.lookup("raw_unicode_escape")  # of Python 2's texts
    before = most_memory()
    failures = [
        failure
        for kind, (make, reader, files) in kinds.items()
        for failure in fuzz(kind, make, reader, CheckpointError, files, seed)
    ]
    for what, times in crashes.items():
        print(f"{what}: {times} times")
    finish(failures, before, MEGABYTES)


if __name__ == "__main__":
    main()
