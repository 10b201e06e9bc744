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
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import h5py
import numpy as np
import safetensors.numpy

from stable_diffusion_tf.checkpoints import h5_files, h5_structure
from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.checkpoints.tensors import open_tensors

DATA = Path(__file__).parent.parent / "tests" / "data"
SECONDS = 5
MEGABYTES = 200
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
JSON_PIECES = (b"0", b"1", b"-", b"9" * 20, b'"', b",", b"[", b"]", b"{", b"}", b"null", b"true")
JSON_PIECES += (b"1e1", b".0", b" ", b"\xc3", b"\\ud800", b"F16", b"I64", b'"a":', b"NaN", b"\0")
PICKLE_PIECES = (
    b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"R", b"b", b"\x81", b"\x92", b"i", b"o",
    b"(", b")", b"]", b"}", b"t", b"e", b"u", b"s", b"a", b"0", b"2", b"Q", b".", b"\x85" * 50,
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"h\x00", b"q\x05",
    b"\x8d" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"Pos\n", b"\x82\x01",
)  # fmt: skip


def mutated(data: bytes, pieces: tuple[bytes, ...], rng: random.Random) -> bytes:
    """`data` with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + rng.randint(0, 8)] = rng.choice(pieces) if pieces else b""
            case 2:
                number = rng.choice(NUMBERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
                changed[at : at + len(number)] = number
            case 3:
                del changed[at : at + rng.randint(1, 64)]
            case 4:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.randint(1, 64)]
            case 5 if rng.random() < 0.2:
                del changed[at:]
    return bytes(changed)


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


def same_as_the_reference(content: bytes, tensors: dict[str, np.ndarray]) -> bool:
    try:
        reference = safetensors.numpy.load(content)
    except safetensors.SafetensorError:
        return False
    return reference.keys() == tensors.keys() and all(
        value.dtype == tensors[name].dtype and value.tobytes() == tensors[name].tobytes()
        for name, value in reference.items()
    )


def too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


crashes: Counter[str] = Counter()


def fuzz(kind: str, make: Callable[[random.Random], bytes], count: int, seed: int) -> list[str]:
    """Reads `count` files; what went wrong with which."""
    failures, opened, slowest = [], 0, 0.0
    for i in range(count):
        content = make(random.Random(f"{kind} {seed} {i}"))
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            path = Path(folder) / "case"
            path.write_bytes(content)
            modules = set(sys.modules)
            start = time.monotonic()
            signal.alarm(SECONDS)
            try:
                tensors = read(path)
                opened += 1
                if kind == "safetensors" and not same_as_the_reference(content, tensors):
                    failures.append(f"{kind} {i}: safetensors reads it otherwise")
            except CheckpointError:
                pass
            except Exception as error:
                failures.append(f"{kind} {i}: {type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - start)
            if new := set(sys.modules) - modules:
                failures.append(f"{kind} {i}: imported {sorted(new)}")
            if os.listdir(folder) != ["case"]:
                failures.append(f"{kind} {i}: made {os.listdir(folder)}")
            os.chdir("/")
    print(f"{kind}: {count} files, {opened} opened, slowest {slowest:.2f} s, "
          f"{len(failures)} failures")  # fmt: skip
    return failures


@click.command(help=__doc__)
@click.option("--count", default=300, show_default=True, help="Files of a kind; half of h5.")
@click.option("--seed", default=0, show_default=True)
def main(count: int, seed: int) -> None:
    h5_files.read_structure = forked_structure
    signal.signal(signal.SIGALRM, too_long)
    kinds = {
        "safetensors": (safetensors_files, count),
        "torch": (torch_files, count),
        "h5": (h5_files_of(h5_file()), count // 2),
    }
    for make, _ in kinds.values():  # what is imported once, is before the first case
        make(random.Random(0))
    codecs.lookup("raw_unicode_escape")  # of Python 2's texts
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failures = [f for kind, work in kinds.items() for f in fuzz(kind, *work, seed)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(f"memory: {grown} MB more")
    for what, times in crashes.items():
        print(f"{what}: {times} times")
    if grown > MEGABYTES:
        failures.append(f"{grown} MB more than before")
    print("\n".join(failures[:20]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
