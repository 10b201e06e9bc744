"""Stand-in weights and inputs by name, the same on every machine.

The goldens in `tests/data` are what the reference implementations computed with them.
"""

import json
import zlib
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"


def normal(key, shape):
    """Standard normal float32, from Philox seeded by the CRC-32 of `key`."""
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode())))
    return rng.standard_normal(shape, dtype=np.float32)


def weight(key, shape):
    """The weight called `key`, in PyTorch's layout."""
    n = normal(key, shape)
    if len(shape) == 1:
        return 1 + 0.1 * n if key.endswith("weight") else 0.1 * n
    if "embedding" in key:
        return 0.5 * n
    return n / np.float32(np.sqrt(np.prod(shape[1:])))


def inputs(key, shape):
    """The network input called `key`."""
    return normal("input/" + key, shape)


def weights(name):
    """All weights of the checkpoint whose names and shapes are in `data/NAME.json`."""
    keys = json.loads((DATA / f"{name}.json").read_text())
    return {key: weight(key, shape) for key, shape in keys}


def golden(name):
    """What the reference computed for the checkpoint NAME: {what: array}."""
    return dict(np.load(DATA / f"{name}.npz"))


def relative_error(output, reference):
    return np.linalg.norm(np.asarray(output) - reference) / np.linalg.norm(reference)
