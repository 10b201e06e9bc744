"""Where models come from: presets, known by name, and folders. Imports no backend."""

import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from stable_diffusion_tf.checkpoints.diffusers import DiffusersFolder
from stable_diffusion_tf.checkpoints.fit import Checkpoint
from stable_diffusion_tf.checkpoints.readers import CheckpointError

Source = str | os.PathLike


@dataclass(frozen=True)
class Preset:
    """A model that comes with the package, in `weights/NAME`."""

    summary: str


PRESETS = {
    "emoji": Preset("the default: small, trained on open emoji artwork, made to run on a CPU"),
}


def preset_folder(name: str) -> Path:
    """Where a preset's files are: inside the installed package, or beside it in a clone.

    Raises:
        CheckpointError: this installation has them in neither place.
    """
    package = Path(str(resources.files("stable_diffusion_tf")))
    candidates = [package / "weights" / name, package.parent / "weights" / name]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"The files of the preset {name!r} are missing from this installation: there is no "
        f"{' nor '.join(map(str, candidates))}. Install the package again."
    )


def open_checkpoint(source: Source) -> Checkpoint:
    """Find and check a checkpoint without reading its weights; `.config` says what it holds.

    Args:
        source: the name of a preset, or a folder in the diffusers layout (a folder that has a
            preset's name is written `./name`).

    Raises:
        FileNotFoundError: the folder lacks files; all of them are named.
        CheckpointError: there is no such source; or a file is damaged or unsupported.
    """
    if isinstance(source, str) and source in PRESETS:
        return DiffusersFolder(preset_folder(source))
    path = Path(source)
    if str(source) and path.is_dir():  # Path("") would be the working directory
        return DiffusersFolder(path)
    known = f"Give a preset ({', '.join(PRESETS)}) or a folder in the diffusers layout."
    if path.is_file():
        raise CheckpointError(f"{path} is a single file, which this version does not load. {known}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(
            f"There is no folder {source}. If it is a model on a hub: this version loads local "
            f"models only; download all of its files first. {known}"
        )
    raise CheckpointError(f"Unknown weights {str(source)!r}: no preset and no folder. {known}")
