"""PyTorch's files (`.ckpt`, `.pt`, `.bin`) as named tensors, without PyTorch and without trust.

`torch.save` pickles a description of the tensors; their numbers lie beside it: since PyTorch 1.6 in
a zip archive that compresses nothing, before that behind the pickle in the same file. The pickle is
read by our own machine (`pickles`), the numbers straight from the file, a tensor or some of its
rows at a time.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from stable_diffusion_tf.checkpoints.pickles import (
    MAX_PICKLE,
    Name,
    PickleError,
    loads,
    ordered_dict,
    skip,
)
from stable_diffusion_tf.checkpoints.readers import (
    ALL,
    KERAS_3,
    MAX_RANK,
    CheckpointError,
    read_values,
    regular_file,
)

STORAGES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
# Beside their tensors, published checkpoints carry the trainer's notes. They are not rebuilt.
NOTES = (
    "_codecs encode",
    "numpy dtype",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping EarlyStopping",
)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
REMEDY = "Nothing in it was run. Take a safetensors file of the same model, or another download."

# The zip format: records end with names and extra fields of the lengths that they state.
END = struct.Struct("<4s4H2IH")
END64_PLACE = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
ENTRY = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
MAX_ENTRIES = 100_000
MAX_DIRECTORY = 16 * 2**20
IN_EXTRA = 2**32 - 1  # a size or offset that stands in the ZIP64 extra field


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int  # of elements


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, like the offset

    @property
    def size(self) -> int:
        """Elements of the storage from the first to the last."""
        steps = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return 1 + steps if all(self.shape) else 0

    def rows(self, rows: slice) -> "_Tensor":
        if not self.shape:  # a number
            return self
        first, end, _ = rows.indices(self.shape[0])
        offset, shape = self.offset + first * self.strides[0], (end - first, *self.shape[1:])
        return replace(self, offset=offset, shape=shape)


class TorchFile:
    """What both of PyTorch's formats become: the tensors of a dict, or of its `state_dict`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or more than tensors and plain containers; nothing was run.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._version = regular_file(self.path)
        try:
            with self.path.open("rb") as file:
                read = _read_zip if file.read(4) == b"PK\x03\x04" else _read_legacy
                contents, self._starts = read(file, self._version.size)
            self._tensors = _tensors(contents)
        except PickleError as error:
            raise CheckpointError(f"{self.path}: {error}. {REMEDY}") from None
        except (struct.error, UnicodeDecodeError):
            raise CheckpointError(f"{self.path}: its zip directory is damaged. {REMEDY}") from None

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].storage.dtype

    def by_rows(self, name: str) -> bool:
        tensor = self._tensors[name]
        return bool(tensor.shape) and tensor.rows(slice(1)).size <= tensor.strides[0]

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """The tensor's values, in its stored dtype."""
        tensor = self._tensors[name].rows(rows)
        storage, dtype = tensor.storage, tensor.storage.dtype
        start = self._starts[storage.key] + tensor.offset * dtype.itemsize
        values = read_values(self.path, self._version, dtype, tensor.size, start)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        if not tensor.size:
            return values.reshape(tensor.shape)
        return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)


def _read_zip(file: BinaryIO, size: int) -> tuple[Any, dict[str, int]]:
    """The pickled object of a zip archive, and where each storage begins."""
    entries = _zip_entries(file, size)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if "model.weights.h5" in entries:
        raise CheckpointError(f"{file.name} {KERAS_3}")
    if len(pickles) != 1:
        raise PickleError("it is a zip archive that PyTorch did not write: unpack it")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise PickleError("it is a TorchScript program, not weights")

    def record(name: str, limit: int) -> bytes:
        start, length = entries[folder + name]
        if length > limit:
            raise PickleError(f"its {name} has {length} bytes, more than any checkpoint's")
        file.seek(start)
        return file.read(length)

    if folder + "byteorder" in entries and record("byteorder", 6) != b"little":
        raise PickleError("its numbers are big-endian, which is not read")

    contents, storages, _ = _unpickle(record("data.pkl", MAX_PICKLE))
    starts = {}
    for key, storage in storages.items():
        starts[key], length = entries.get(f"{folder}data/{key}", (0, None))
        if length != storage.count * storage.dtype.itemsize:
            raise PickleError(f"it does not hold the storage {key[:100]!a} that it describes")
    return contents, starts


def _zip_entries(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Each entry's first byte and length; the directory must agree with what lies in the file."""
    ends = END.size + END64_PLACE.size
    file.seek(max(size - ends, 0))
    tail = file.read(ends).rjust(ends, b"\0")
    magic, *_, count, length, start, comment = END.unpack(tail[END64_PLACE.size :])
    if magic != b"PK\x05\x06" or comment:
        raise PickleError("it is cut off, or a zip archive that PyTorch did not write")
    magic, _, place, _ = END64_PLACE.unpack(tail[: END64_PLACE.size])
    if magic == b"PK\x06\x07":
        if place > size - END64.size:
            raise PickleError("its zip directory is damaged")
        file.seek(place)
        magic, *_, count, length, start = END64.unpack(file.read(END64.size))
        if magic != b"PK\x06\x06":
            raise PickleError("its zip directory is damaged")
    if count > MAX_ENTRIES or length > MAX_DIRECTORY or start + length > size:
        raise PickleError("its zip directory is damaged")
    file.seek(start)
    directory = file.read(length)

    entries: dict[str, tuple[int, int]] = {}
    places = []
    position = 0
    for _ in range(count):
        name, local, stored, position = _zip_entry(directory, position)
        if name in entries or local > size:
            raise PickleError(f"its zip directory has {name!a} twice, or nowhere")
        begin = _zip_data(file, name, local, stored)
        entries[name] = (begin, stored)
        places.append((local, begin + stored))
    after = 0
    for begin, end in sorted(places):
        if begin < after or end > start:
            raise PickleError("its zip entries overlap")
        after = end
    return entries


def _zip_entry(directory: bytes, position: int) -> tuple[str, int, int, int]:
    """The entry at a position of the directory: name, place, length; and the next's position."""
    (magic, _, _, flags, method, _, _, _, packed, length, name_length, extra_length, comment,
     *_, local) = ENTRY.unpack_from(directory, position)  # fmt: skip
    position += ENTRY.size
    name = directory[position : position + name_length].decode()
    position += name_length
    extra = directory[position : position + extra_length]
    if magic != b"PK\x01\x02" or position + extra_length + comment > len(directory):
        raise PickleError("its zip directory is damaged")
    while len(extra) >= 4:
        kind, kind_length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{kind_length // 8}Q", extra, 4))
            length, packed, local = (
                wide.pop(0) if value == IN_EXTRA and wide else value
                for value in (length, packed, local)
            )
        extra = extra[4 + kind_length :]
    if method or packed != length or flags & 1:
        raise PickleError("its zip entries are compressed or encrypted, which PyTorch never does")
    return name, local, length, position + extra_length + comment


def _zip_data(file: BinaryIO, name: str, local: int, length: int) -> int:
    """Where an entry's data begins, if its own header says what the directory does."""
    file.seek(local)
    header = file.read(LOCAL.size)
    if len(header) < LOCAL.size:
        raise PickleError("its zip directory is damaged")
    magic, _, flags, method, _, _, _, packed, unpacked, name_length, extra_length = LOCAL.unpack(
        header
    )
    lengths = {0, length, IN_EXTRA} if flags & 8 else {length, IN_EXTRA}
    if (
        magic != b"PK\x03\x04"
        or method
        or not {packed, unpacked} <= lengths
        or file.read(name_length) != name.encode()
    ):
        raise PickleError(f"its zip entry {name!a} is not what the directory says")
    return local + LOCAL.size + name_length + extra_length


def _read_legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, int]]:
    """The pickled object of a file from before PyTorch 1.6, and where each storage begins."""
    position = 0

    def unpickle() -> tuple[Any, dict[str, _Storage]]:
        nonlocal position
        file.seek(position)
        contents, storages, length = _unpickle(file.read(MAX_PICKLE))
        position += length
        return contents, storages

    if unpickle()[0] != LEGACY_MAGIC or unpickle()[0] != LEGACY_VERSION:
        raise PickleError("it is a Python pickle, not a file of PyTorch")
    system = unpickle()[0]
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise PickleError("its numbers are big-endian, which is not read")
    contents, storages = unpickle()
    keys = unpickle()[0]
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise PickleError("it is damaged (it does not list its storages)")
    starts: dict[str, int] = {}
    for key in keys:
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        if key not in storages or key in starts or count != storages[key].count:
            raise PickleError("it is damaged (its storages are not those it describes)")
        starts[key] = position + 8
        position += 8 + count * storages[key].dtype.itemsize
        if position > size:
            raise PickleError(f"it is truncated: it has {size} of at least {position} bytes")
    if starts.keys() != storages.keys():
        raise PickleError("it is damaged (it lacks storages that it describes)")
    return contents, starts


def _unpickle(data: bytes) -> tuple[Any, dict[str, _Storage], int]:
    """A pickle's contents, the storages that its tensors lie in, and its length."""
    storages: dict[str, _Storage] = {}

    def persistent(identity: Any) -> _Storage:
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise PickleError("it refers to something that is no storage of tensors")
        _, kind, key, _, count, *view = identity
        if (
            type(kind) is not Name
            or kind.name not in STORAGES
            or type(key) is not str
            or not _is_size(count)
            or view not in ([], [None])
        ):
            raise PickleError("it describes a storage of tensors in no way that PyTorch does")
        storage = _Storage(key, STORAGES[kind.name], count)
        if storages.setdefault(key, storage) != storage:
            raise PickleError(f"it describes the storage {key[:100]!a} twice")
        return storage

    contents, length = loads(data, NAMES, persistent)
    return contents, storages, length


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    if any(rest[2:]):  # after what training needs
        raise PickleError("it describes a tensor that is negated or conjugated when it is read")
    if (
        type(storage) is not _Storage
        or not _is_size(offset)
        or not all(type(sizes) is tuple and all(map(_is_size, sizes)) for sizes in (shape, strides))
        or len(shape) != len(strides)
        or len(shape) > MAX_RANK
    ):
        raise PickleError("it describes a tensor in no way that PyTorch does")
    # An axis of one element is never stepped along, so that its stride may be anything.
    strides = tuple(stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
    tensor = _Tensor(storage, offset, shape, strides)
    if offset + tensor.size > storage.count:
        raise PickleError("it describes a tensor that is larger than its storage")
    return tensor


def _rebuild_parameter(tensor: Any, *rest: Any) -> _Tensor:
    if type(tensor) is not _Tensor:
        raise PickleError("it describes a parameter that is no tensor")
    return tensor


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensors(contents: Any) -> Mapping[str, _Tensor]:
    """The tensors of a checkpoint; what else it notes is not looked at."""
    if type(contents) is dict and type(contents.get("state_dict")) is dict:
        contents = contents["state_dict"]
    if type(contents) is not dict:
        raise PickleError(f"it holds a {type(contents).__name__}, not tensors with names")
    tensors = {name: value for name, value in contents.items() if type(value) is _Tensor}
    if not tensors:
        raise PickleError("it holds no tensors with names")
    if not all(type(name) is str and name.isprintable() for name in tensors):
        raise PickleError("it holds tensors whose names are not text")
    return tensors


NAMES = {
    "collections OrderedDict": ordered_dict,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    **dict.fromkeys(STORAGES),
    **dict.fromkeys(NOTES, skip),
}
