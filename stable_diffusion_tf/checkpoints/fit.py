"""Which tensor of a file fills which variable of a model: all of them, or one error."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stable_diffusion_tf.checkpoints.readers import CheckpointError, TensorFile
from stable_diffusion_tf.config import ModelConfig

LISTED = 10  # names in an error, of each kind


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
    renames: tuple[tuple[str, str], ...] = ()  # (pattern, replacement): ours -> theirs
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
        name = _renamed(f"{layer}.{self.suffixes[suffix]}", self.renames)
        return self.prefix + name, shape, axes

    def piece(self, variable: Any) -> tuple[int, int]:
        """Which part of its tensor a variable is, along the first axis, and of how many."""
        for i, pattern in enumerate(self.pieces):
            if re.search(pattern, variable.path):
                return i, len(self.pieces)
        return 0, 1

    def todays_name(self, name: str) -> str:
        """What a tensor that a file calls `name` is called today."""
        return _renamed(name, self.aliases)

    def ignores(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)


@dataclass(frozen=True)
class Match:
    """A variable and the tensor that fills it."""

    variable: Any
    file: TensorFile
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def fill(self) -> None:
        """Read the tensor and assign it.

        Raises:
            CheckpointError: it has a NaN or an infinity, as stored or in the variable's dtype.
        """
        tensor = self.file.read(self.name)
        with np.errstate(over="ignore"):
            value = tensor.reshape(self.shape).transpose(self.axes).astype(self.variable.dtype)
        if not np.isfinite(value).all():
            cause = (
                f"is too large for {self.variable.dtype}; load it as float32"
                if np.isfinite(tensor).all()
                else "has NaN or infinite values; download it again, or take another checkpoint"
            )
            raise CheckpointError(f"{self.file.path}: {self.name} {cause}.")
        self.variable.assign(value)


class Checkpoint(Protocol):
    """An opened source, of whatever format."""

    config: ModelConfig

    def match(self, part: str, variables: Sequence[Any]) -> list[Match]:
        """What fills the variables of "text_encoder", "unet", "encoder" or "decoder"."""


def match(variables: Sequence[Any], file: TensorFile, table: Table) -> list[Match]:
    """Find each variable's tensor, without reading or changing any.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape or no floats; it lists
            all of them.
    """
    stored: dict[str, str] = {}
    extra = []
    for name in file.names:
        today = table.todays_name(name)
        if table.ignores(name):
            continue
        if today in stored:
            extra.append(name)
        stored[today] = name

    matches, missing, misfits = [], [], []
    for variable in variables:
        today, shape, axes = table.tensor(variable)
        name = stored.pop(today, None)
        if name is None:
            missing.append(today)
            continue
        found = file.shape(name)
        pointwise = re.search(table.pointwise, today) and found == (*shape, 1, 1)
        if found != shape and not pointwise:
            misfits.append(f"{name} is {found}, the model needs {shape}")
        elif "float" not in file.dtype(name).name:
            misfits.append(f"{name} is {file.dtype(name)}, not floats")
        matches.append(Match(variable, file, name, shape, axes))
    extra += stored.values()

    problems = [
        *_listed("missing", missing),
        *_listed("not part of the model", extra),
        *_listed("of the wrong shape or type", misfits),
    ]
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{file.path} does not fit its config:", *problems])
            + "\nTake the config and the weights from the same checkpoint."
        )
    return matches


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")
    return [f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {what}: {shown}"]
