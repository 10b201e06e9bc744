"""Weight files as {name: tensor}, a tensor or some rows read at a time; nothing is executed."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message says what, why, and what to do."""


# Said of a file: what Keras 3 saves finds its place only in a network built as the saved one.
KERAS_3 = (
    "is of Keras 3's own format, which is not read here. Load it into a network built as the one "
    "that was saved, by its `load_weights`; `StableDiffusion.save_pretrained` writes what is read."
)
ALL = slice(None)  # rows


class TensorFile(Protocol):
    """Named tensors on disk. Shapes and dtypes are known at once; values are read on request.

    `rows`, without a step, are those of a tensor's first axis. `by_rows` says whether they alone
    are read; else, as of a transposed tensor of PyTorch's, what lies between them is read too.
    """

    path: Path

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def by_rows(self, name: str) -> bool: ...

    def read(self, name: str, rows: slice = ALL) -> np.ndarray: ...


DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_JSON = 4 * 2**20  # bytes, of a header too: twenty times a large model's, but little when parsed
MAX_RANK = 32  # of a NumPy array

# First bytes of what people take for a checkpoint's file, and for weights.
NOT_DOWNLOADED = (
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`, or download the file"),
    (b"<", "an HTML or XML page, likely an error page: download the file again"),
)
LOOKALIKES = (*NOT_DOWNLOADED, (b"{", "JSON: download the weights themselves"))


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning
    size: int


class SafetensorsFile:
    """A `.safetensors` file: 8 bytes of header length, a JSON header, the tensors' bytes.

    The header is checked in full on opening, as strictly as the reference implementation does
    (github.com/huggingface/safetensors): known dtypes, sizes that match the shapes, and tensors
    that fill the file without a gap or an overlap. Its length more strictly: the reference reads
    100 MB, and this `MAX_JSON`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is something else, truncated or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._version = regular_file(self.path)
        self._entries, self.metadata = _read_header(self.path, self._version.size)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

    def by_rows(self, name: str) -> bool:
        return True

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """The tensor's values, in its stored dtype."""
        entry = self._entries[name]
        return read_rows(self.path, self._version, entry.dtype, entry.shape, entry.start, rows)


class Version(NamedTuple):
    """What tells a file from another in its place, and from itself before it was changed."""

    node: int
    size: int  # bytes
    changed: int  # nanoseconds

    @classmethod
    def of(cls, status: os.stat_result) -> "Version":
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


def read_rows(
    path: Path, version: Version, dtype: np.dtype, shape: tuple[int, ...], start: int, rows: slice
) -> np.ndarray:
    """Rows of the tensor of `shape` at the byte `start` of a file. Errors as of `read_values`."""
    if shape:
        first, end, _ = rows.indices(shape[0])
        start += first * math.prod(shape[1:]) * dtype.itemsize
        shape = (end - first, *shape[1:])
    return read_values(path, version, dtype, math.prod(shape), start).reshape(shape)


def read_values(
    path: Path, version: Version, dtype: np.dtype, count: int, start: int
) -> np.ndarray:
    """`count` values from the byte `start` of a file on: (count,).

    Raises:
        CheckpointError: the file is no longer the version that `start` was found in; or it ends
            before them.
    """
    size = count * dtype.itemsize
    with path.open("rb") as file:
        if Version.of(os.fstat(file.fileno())) != version:
            raise CheckpointError(f"{path} has changed since it was opened. Open the model again.")
        data = np.fromfile(file, np.uint8, size, offset=start)  # which knows no bfloat16
    if data.size != size:
        raise CheckpointError(f"{path} was cut short while it was read.")
    return data.view(dtype)


def save_safetensors(
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, for its owner only; `atomic_path` makes it whole and readable.

    Raises:
        OSError: it cannot be written.
    """
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def regular_file(path: Path) -> Version:
    """The version of a file, with its size.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is empty, or a folder or a device.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}.")
    version = Version.of(path.stat())
    if version.size == 0:
        raise CheckpointError(f"{path} is empty. Download it again.")
    return version


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON file that holds an object, without repeated keys. NaN and infinities may be in it.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is something else.
    """
    path = Path(path)
    if regular_file(path).size > MAX_JSON:
        raise CheckpointError(f"{path} is too large for a JSON file of a checkpoint.")
    data = path.read_bytes()
    try:
        return _parse_object(data, constant=float)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not the JSON it should be ({error}){looks_like(data, NOT_DOWNLOADED)}."
        ) from None


def _read_header(path: Path, size: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if MAX_JSON < length < size and start[8:9] == b"{":
            raise CheckpointError(
                f"{path} has a header of {length} bytes; at most {MAX_JSON} are read. Save it "
                "again with less metadata."
            )
        if size < 8 or length > MAX_JSON:
            raise CheckpointError(f"{path} is not a safetensors file{looks_like(start)}.")
        if size < 8 + length:
            raise _truncated(path, size, 8 + length)
        file.seek(8)
        header = file.read(length)
    try:
        if not header.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        fields = _parse_object(header, constant=_refuse)
        metadata = _check_metadata(fields.pop("__metadata__", None))
        entries = {name: _check_entry(name, field) for name, field in fields.items()}
        end = _check_layout(entries)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its header is damaged: {error}. Download it again."
        ) from None
    data = 8 + length
    if size < data + end:
        raise _truncated(path, size, data + end)
    if size > data + end:
        raise CheckpointError(
            f"{path} has {size - data - end} bytes after its last tensor. Download it again."
        )
    return {
        name: _Entry(entry.dtype, entry.shape, data + entry.start, entry.size)
        for name, entry in entries.items()
    }, metadata


def _check_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError("'__metadata__' is not an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"'__metadata__' has a value that is not text, at {key!r}")
    return metadata


def _check_entry(name: str, field: Any) -> _Entry:
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"{name!r} has the impossible shape {shape}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} has the impossible offsets {offsets}")
    size = offsets[1] - offsets[0]
    # The reference multiplies all sizes in 64 bits before it compares, zeros in any place.
    if math.prod(filter(None, shape)) * DTYPES[dtype].itemsize * 8 >= 2**64:
        raise ValueError(f"{name!r} has the impossible shape {shape}")
    if math.prod(shape) * DTYPES[dtype].itemsize != size:
        raise ValueError(f"{name!r} has {size} bytes, which {dtype} of shape {shape} is not")
    return _Entry(DTYPES[dtype], tuple(shape), offsets[0], size)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**64 for v in values)


def _check_layout(entries: Mapping[str, _Entry]) -> int:
    """Where the last tensor ends, if all follow one another from 0 on."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise ValueError(f"{name!r} begins at byte {entry.start}, not {end}")
        end += entry.size
    return end


def _parse_object(data: bytes, constant: Callable[[str], Any]) -> dict[str, Any]:
    """JSON bytes -> dict; refuses what Python's parser lets through and the standard does not.

    Only `constant` decides about NaN, Infinity and -Infinity, which Python writes for floats.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        for key, value in pairs:
            for text in (key, value):
                if isinstance(text, str):
                    text.encode()  # half a surrogate pair is a ValueError
        return result

    def integer(text: str) -> int:
        if text == "-0":
            raise ValueError("-0 is not an integer")
        return int(text)

    try:
        fields = json.loads(
            data.decode(), object_pairs_hook=unique, parse_int=integer, parse_constant=constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("it is not an object")
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _truncated(path: Path, size: int, needed: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated: it has {size} of at least {needed} bytes. Download it again."
    )


def looks_like(data: bytes, known: Iterable[tuple[bytes, str]] = LOOKALIKES) -> str:
    start = data.lstrip()
    for magic, what in known:
        if start.startswith(magic):
            return f"; it looks like {what}"
    return ""
