"""Which tensor of a file fills which variable of a model: all of them, or one error."""

import math
import mmap
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stable_diffusion_tf.checkpoints.readers import ALL, CheckpointError, TensorFile
from stable_diffusion_tf.checkpoints.tensors import stored_in
from stable_diffusion_tf.config import ModelConfig

LISTED = 10  # names in an error, of each kind
PRIVATE = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
BLOCK = 2**20  # bytes that are put in order at a time, in a processor's caches; at least a row


@dataclass(frozen=True)
class Table:
    """How a format names and lays out one network's weights: rules, not a list of names.

    A variable `some.layer/kernel` is the tensor `prefix` + `some.layer.` + what `suffixes` says
    for `kernel`, as changed by `renames` one after another. `axes` says, for a suffix and a rank,
    which axis of the tensor is each axis of the variable. Patterns are regular expressions,
    searched for in a tensor's name.
    """

    suffixes: dict[str, str]
    axes: dict[tuple[str, int], tuple[int, ...]]
    prefix: str = ""
    renames: tuple[tuple[str, str | Callable], ...] = ()  # (pattern, replacement): ours -> theirs
    pieces: tuple[str, ...] = ()  # patterns of ours that are stacked in one tensor, in order
    aliases: tuple[tuple[str, str], ...] = ()  # (pattern, replacement): older names -> today's
    ignored: tuple[str, ...] = ()  # patterns of tensors that no network needs
    pointwise: str = r"(?!)"  # pattern of matrices that may be stored as 1x1 convolutions

    def tensor(self, variable: Any) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """A variable's tensor: its name, its shape, and its axes in the variable's order."""
        layer, suffix = variable.path.rsplit("/", 1)
        rank = len(variable.shape)
        axes = self.axes.get((suffix, rank), tuple(range(rank)))
        shape = tuple(int(variable.shape[axes.index(axis)]) for axis in range(rank))
        name = f"{layer}.{self.suffixes[suffix]}"
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return self.prefix + name, shape, axes

    def piece(self, variable: Any) -> tuple[int, int]:
        """Which part of its tensor a variable is, along the first axis, and of how many."""
        for i, pattern in enumerate(self.pieces):
            if re.search(pattern, variable.path):
                return i, len(self.pieces)
        return 0, 1

    def todays_name(self, name: str) -> str:
        """What a tensor that a file calls `name` is called today."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)

    def match(self, variables: Sequence[Any], file: TensorFile) -> list["Match"]:
        """Find each variable's tensor, without reading or changing any.

        Raises:
            CheckpointError: tensors are missing, left over, of another shape or no floats; it lists
                all of them.
        """
        stored: dict[str, str] = {}
        extra = []
        for name in file.names:
            today = self.todays_name(name)
            if self.ignores(name):
                continue
            if today in stored:
                extra.append(name)
            stored[today] = name

        matches, missing, misfits, used = [], [], [], set()
        for variable in variables:
            today, shape, axes = self.tensor(variable)
            name = stored.get(today)
            if name is None:
                missing.append(today)
                continue
            used.add(name)
            piece, pieces = self.piece(variable)
            whole = (shape[0] * pieces, *shape[1:])
            found = file.shape(name)
            pointwise = re.search(self.pointwise, today) and found == (*whole, 1, 1)
            misfits += misfit(file, name, whole if not pointwise else found)
            matches.append(Match(variable, file, name, shape, axes, piece))
        extra += [name for name in stored.values() if name not in used]
        refuse(
            file,
            [
                *listed("missing", dict.fromkeys(missing)),
                *listed("not part of the model", extra),
                *listed("of the wrong shape or type", dict.fromkeys(misfits)),
            ],
        )
        return matches


@dataclass(frozen=True)
class Match:
    """A variable and the tensor that fills it, or the piece of one."""

    variable: Any
    file: TensorFile
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    piece: int = 0  # which of the tensors of this shape that the file has stacked in one

    def read(self) -> np.ndarray:
        """The variable's value: the tensor in the variable's dtype and order of axes.

        Raises:
            CheckpointError: it cannot be read; or it has a NaN or an infinity, as stored or in the
                variable's dtype.
        """
        value = empty([self.shape[axis] for axis in self.axes], self.variable.dtype)
        as_stored = value.transpose(np.argsort(self.axes))
        row = 0
        for stored in self._blocks():
            with np.errstate(over="ignore"):
                block = stored.astype(value.dtype, copy=False)
            if not np.isfinite(block).all():
                wider = "" if self.variable.dtype == "float32" else "; load it as float32"
                cause = (
                    f"is too large for {self.variable.dtype}{wider}"
                    if all(np.isfinite(stored).all() for stored in self._blocks())
                    else "has NaN or infinite values; download it again, or take another checkpoint"
                )
                raise CheckpointError(f"{self.file.path}: {self.name} {cause}.")
            as_stored[row : row + len(block)] = block
            row += len(block)
        return value

    def _blocks(self) -> Iterator[np.ndarray]:
        """Its rows, one block after another; in one, where the file has no such rows."""
        stored, row = self.file.shape(self.name), math.prod(self.shape[1:])
        first, end = (piece * self.shape[0] for piece in (self.piece, self.piece + 1))
        if math.prod(stored[1:]) != row or not self.file.by_rows(self.name):
            yield self._read(ALL)[first:end]
            return
        step = max(1, BLOCK // (row * self.file.dtype(self.name).itemsize))
        for start in range(first, end, step):
            yield self._read(slice(start, min(start + step, end)))

    def _read(self, rows: slice) -> np.ndarray:
        try:
            return self.file.read(self.name, rows).reshape(-1, *self.shape[1:])
        except CheckpointError:
            raise
        except (OSError, ValueError, OverflowError) as error:  # whatever a hostile file leads to
            raise CheckpointError(
                f"{self.file.path}: {self.name} cannot be read: {error}"
            ) from error


def empty(shape: Sequence[int], dtype: str) -> np.ndarray:
    """An array of any values, at whose memory a backend can take it for a tensor's: whole pages.

    Not NumPy's, which asks for huge pages: until they are had and cleared, it takes twice as long
    to fill them.
    """
    dtype, count = np.dtype(dtype), math.prod(shape)
    memory = mmap.mmap(-1, count * dtype.itemsize, **PRIVATE)
    return np.frombuffer(memory, dtype, count).reshape(shape)


class PartTable(Protocol):
    """How a format stores one network: what finds each variable's tensor in a file."""

    def match(self, variables: Sequence[Any], file: TensorFile) -> list[Match]: ...


Part = Callable[[Sequence[Any]], list[Match]]  # what fills a network's variables; or an error


@dataclass(frozen=True)
class Checkpoint:
    """An opened source, of whatever format: what model it is, and what fills which networks."""

    config: ModelConfig
    parts: Mapping[str, Part]

    def match(self, part: str, variables: Sequence[Any]) -> list[Match]:
        """What fills the variables of "text_encoder", "unet", "encoder" or "decoder".

        Raises:
            CheckpointError: the checkpoint does not have this network; or tensors do not fit.
        """
        if part not in self.parts:
            raise CheckpointError(
                f"{self.config.name} has no {part}, only {', '.join(self.parts)}; name a file that "
                "holds it."
            )
        return self.parts[part](variables)


def watched(checkpoint: Checkpoint, tell: Callable[[str, list[Path]], None]) -> Checkpoint:
    """The same, which tells the files of a network, `tell(part, paths)`, before they are read.

    An index of shards is none of them: models that differ may have the same.
    """

    def match(part: str, variables: Sequence[Any]) -> list[Match]:
        matches = checkpoint.match(part, variables)
        tell(part, list(dict.fromkeys(path for match in matches for path in stored_in(match.file))))
        return matches

    return replace(checkpoint, parts={part: partial(match, part) for part in checkpoint.parts})


def misfit(file: TensorFile, name: str, needed: tuple[int, ...]) -> list[str]:
    """What is wrong with a tensor's shape and type, in words."""
    found = file.shape(name)
    if found != needed:
        transposed = "transposed: " if found == needed[::-1] else ""
        return [f"{name} is {transposed}{found}, the model needs {needed}"]
    if "float" not in file.dtype(name).name:
        return [f"{name} is {file.dtype(name)}, not floats"]
    return []


def refuse(file: TensorFile, problems: Sequence[str]) -> None:
    """Raises CheckpointError if there are problems, naming all of them."""
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{file.path} does not fit its config:", *problems])
            + "\nTake the config and the weights from the same checkpoint."
        )


def listed(what: str, names: Collection[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(list(names)[:LISTED]) + (", …" if len(names) > LISTED else "")
    return [f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {what}: {shown}"]
