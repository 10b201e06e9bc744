"""Any file of weights as named tensors: what it is, its first bytes say, not its name."""

import os
from pathlib import Path

import numpy as np

from stable_diffusion_tf.checkpoints.h5_files import H5File
from stable_diffusion_tf.checkpoints.readers import (
    ALL,
    CheckpointError,
    SafetensorsFile,
    TensorFile,
    looks_like,
    read_json,
    regular_file,
)
from stable_diffusion_tf.checkpoints.torch_files import TorchFile

H5_MAGIC = b"\x89HDF\r\n\x1a\n"
MAGIC = {H5_MAGIC: H5File, b"PK\x03\x04": TorchFile, b"\x80": TorchFile}


class ShardedFile:
    """Several files of weights under one index in JSON (`*.index.json`), as one.

    Attributes:
        path: the index.
        shards: the files.

    Raises:
        FileNotFoundError: the index or a shard is not there.
        CheckpointError: the index and its shards disagree; or a shard is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        places = read_json(self.path).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise CheckpointError(
                f"{self.path} is JSON, and no 'weight_map' in it maps names to files. Take weights "
                "or the index of their shards; of a failed download only an error message stays."
            )
        for shard in set(places.values()):
            if shard != Path(shard).name or shard in ("", "..") or "\\" in shard:
                raise CheckpointError(f"{self.path}: {shard!r} is not a file beside the index.")
        shards = {s: _open_one(self.path.parent / s) for s in sorted(set(places.values()))}
        self.shards = tuple(shards.values())
        self._places = {name: shards[shard] for name, shard in places.items()}

        held = {(name, shard) for shard, file in shards.items() for name in file.names}
        if problems := sorted(held ^ set(places.items())):
            name, shard = problems[0]
            raise CheckpointError(
                f"{self.path} and its shards disagree about {len(problems)} tensors, the first "
                f"is {name} in {shard}. Take index and shards from the same download."
            )

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._places[name].dtype(name)

    def by_rows(self, name: str) -> bool:
        return self._places[name].by_rows(name)

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        return self._places[name].read(name, rows)


def open_tensors(path: str | os.PathLike) -> TensorFile:
    """Open a file of weights: safetensors, PyTorch's, Keras's h5, or the index of several.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is something else, damaged, or more than data.
    """
    path = Path(path)
    regular_file(path)
    start = first_bytes(path)
    is_index = start.lstrip().startswith(b"{") and b"\0" not in start
    return ShardedFile(path) if is_index else _open_one(path)


def stored_in(file: TensorFile) -> list[Path]:
    """Where the tensors are: in the file itself, or in its shards."""
    return [one.path for one in (file.shards if isinstance(file, ShardedFile) else [file])]


def _open_one(path: Path) -> TensorFile:
    regular_file(path)
    start = first_bytes(path)
    if start[4:9] == b"\0\0\0\0{":  # the first four may be any: the length of a header
        return SafetensorsFile(path)
    for magic, reader in MAGIC.items():
        if start.startswith(magic):
            return reader(path)
    raise CheckpointError(
        f"{path} is no file of weights (safetensors, PyTorch or Keras h5){looks_like(start)}."
    )


def first_bytes(path: Path) -> bytes:
    """Enough of a file to say what it is."""
    with path.open("rb") as file:
        return file.read(64)
