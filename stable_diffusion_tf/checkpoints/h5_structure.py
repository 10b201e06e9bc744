"""Where the weights of a Keras h5 file lie: `python -m … FILE` prints it as JSON.

A damaged file can crash the HDF5 library, or keep it busy for ever, so this is run as a process of
its own with limits; see `h5_files`. The numbers are not read here.

Keras 2's files say in attributes which groups (`layer_names`) and weights in them (`weight_names`)
there are, in the order the weights are found by; a list of more than 64 kB is split into
`weight_names0`, `weight_names1`, ….
"""

import json
import math
import sys
from pathlib import Path

import h5py

MEMORY = 150 * 2**20  # bytes, beyond what this process has when it starts to read
SECONDS = 4  # of computing
MAX_ATTRIBUTE = 2**20


def structure(path: str) -> list[tuple[str, str, list[int], int]] | None:
    """Each weight's name, dtype, shape and first byte in the file, in Keras's order.

    None: it is of Keras 3's own format, whose groups are a model's attributes.
    """
    with h5py.File(path, "r") as file:
        if "vars" in file:
            return None
        root = file if _has(file, "layer_names") else _child(file, "model_weights")
        weights = []
        for layer in _texts(root, "layer_names"):
            group = _child(root, layer)
            for name in _texts(group, "weight_names"):
                weights.append((f"{layer}/{name}", *_place(_child(group, name), name)))
        return weights


def _has(group: h5py.Group, attribute: str) -> bool:
    return attribute in group.attrs or f"{attribute}0" in group.attrs


def _texts(group: h5py.Group, attribute: str) -> list[str]:
    """A list of texts among a group's attributes."""
    if attribute in group.attrs:
        names = [attribute]
    else:
        names = []
        while f"{attribute}{len(names)}" in group.attrs:
            names.append(f"{attribute}{len(names)}")
        if not names:
            raise ValueError(f"{group.name} has no {attribute}: these are no weights of Keras 2")
    texts = []
    for name in names:
        attribute_id = group.attrs.get_id(name)
        if math.prod(attribute_id.shape) * attribute_id.dtype.itemsize > MAX_ATTRIBUTE:
            raise ValueError(f"{group.name} has an impossible {name}")
        values = group.attrs[name]
        texts += [v.decode() if isinstance(v, bytes) else str(v) for v in values]
    return texts


def _child(group: h5py.Group, path: str) -> h5py.Group | h5py.Dataset:
    """What is at a path below `group`, by links that do not leave the file."""
    for name in path.split("/"):
        if not isinstance(group, h5py.Group) or name in ("", ".") or name not in group:
            raise ValueError(f"it has no {path}: these are no weights of Keras 2")
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{path} is a link elsewhere ({type(link).__name__})")
        group = group[name]
    return group


def _place(weight: h5py.Group | h5py.Dataset, name: str) -> tuple[str, list[int], int]:
    if not isinstance(weight, h5py.Dataset):
        raise ValueError(f"{name} is no array")
    creation = weight.id.get_create_plist()
    if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_external_count():
        raise ValueError(f"{name} is compressed, virtual or in another file: save it plainly")
    offset = weight.id.get_offset()
    if offset is None and weight.size:
        raise ValueError(f"{name} has no values")
    # h5py tells of the type nearest to the one on the disk; files may describe floats of any kind.
    if weight.dtype.kind == "f" and h5py.h5t.py_create(weight.dtype) != weight.id.get_type():
        raise ValueError(f"{name} has floats of a kind that NumPy has not: save it as float32")
    return weight.dtype.str, list(weight.shape), offset or 0


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's timeout remains
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    held = Path("/proc/self/statm")
    if held.exists():  # Linux, the only one that enforces this
        pages = int(held.read_text().split()[0]) + MEMORY // resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)


def main() -> None:
    _limit()
    try:
        answer = {"weights": structure(sys.argv[1])}
    except Exception as error:  # whatever a damaged file makes the library raise
        answer = {"error": " ".join(str(error).split()) or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
