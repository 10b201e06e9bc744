"""Keras's h5 files as named tensors. The HDF5 library never touches them in this process."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from stable_diffusion_tf.checkpoints.readers import (
    ALL,
    KERAS_3,
    MAX_RANK,
    CheckpointError,
    read_rows,
    regular_file,
)

SECONDS = 60  # for a process that computes for 4, on a machine that is busy
STRUCTURE = "stable_diffusion_tf.checkpoints.h5_structure"


class H5File:
    """A weight file of Keras 2 (`save_weights("….h5")`), its tensors in Keras's order.

    Where the tensors lie is found out by a process of its own, because a damaged file can crash
    the HDF5 library or keep it busy; their bytes are then read here, without the library.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, something else than weights of Keras 2, or not plain:
            compressed, virtual, or with links to other files.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._version = regular_file(self.path)
        try:
            weights = read_structure(self.path)["weights"]
            if weights is None:
                raise CheckpointError(f"{self.path} {KERAS_3}")
            self._places = {
                name: (np.dtype(dtype), tuple(shape), offset)
                for name, dtype, shape, offset in weights
            }
            for name, (dtype, shape, offset) in self._places.items():
                if dtype.hasobject or len(shape) > MAX_RANK:
                    raise ValueError(f"{name} is no array of numbers")
                in_file = 0 <= offset <= self._version.size - math.prod(shape) * dtype.itemsize
                if not in_file or any(n < 0 for n in shape):
                    raise ValueError(f"{name} of shape {shape} is not in the file")
            if not weights or len(weights) != len(self._places):
                raise ValueError("it has no weights" if not weights else "a weight is there twice")
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.path} is damaged, or no weight file of Keras 2: {error}. Download it again."
            ) from None

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][1]

    def dtype(self, name: str) -> np.dtype:
        return self._places[name][0]

    def by_rows(self, name: str) -> bool:
        return True

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """The tensor's values, in its stored dtype."""
        dtype, shape, offset = self._places[name]
        return read_rows(self.path, self._version, dtype, shape, offset, rows)


def read_structure(path: Path) -> dict:
    """What `h5_structure` prints about a file.

    Raises:
        ValueError: the file kept it busy, crashed it, or is damaged in another way.
    """
    paths = os.pathsep.join(filter(None, sys.path))  # the process has this one's packages
    environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", STRUCTURE, str(path.absolute())],
            env=environment,
            cwd=Path(__file__).parents[2],  # Python imports from there first: not from the user's
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError("reading its structure took too long") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"the HDF5 library gave up on it ({done.returncode}) {last}") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer
