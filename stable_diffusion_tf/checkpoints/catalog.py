"""The models known by name."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from stable_diffusion_tf.checkpoints.readers import CheckpointError


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
