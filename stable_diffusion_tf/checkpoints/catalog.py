"""Where models come from: presets, known by name, folders and files. Imports no backend."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from stable_diffusion_tf.checkpoints import keras_h5
from stable_diffusion_tf.checkpoints.diffusers import ENDINGS, FILES, find_weights, open_folder
from stable_diffusion_tf.checkpoints.fit import Checkpoint, PartTable
from stable_diffusion_tf.checkpoints.layouts import find_config, find_layout
from stable_diffusion_tf.checkpoints.readers import CheckpointError, TensorFile
from stable_diffusion_tf.checkpoints.tensors import H5_MAGIC, open_tensors
from stable_diffusion_tf.config import ModelConfig

Source = str | os.PathLike | Mapping  # of networks to files
PARTS = ("text_encoder", "unet", "encoder", "decoder")
MAX_YAML = 2**20  # bytes


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


def open_checkpoint(
    source: Source,
    *,
    config: ModelConfig | None = None,
    prediction: Literal["epsilon", "v"] | None = None,
    vae: str | os.PathLike | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """Find and check a checkpoint without reading its weights; `.config` says what it holds.

    Args:
        source: the name of a preset; a folder in the diffusers layout or with Keras's h5 files (one
            that has a preset's name is written `./name`); a single CompVis or Stability file; or
            files by network, {"text_encoder": …, "unet": …, "encoder": …, "decoder": …} or some.
            What a file is, its content says; its name does not matter.
        config: of the model, if the tensors' sizes are not those of a published one.
        prediction: what the UNet predicts; None: what the source's config says. Single files are
            taken as "epsilon" unless a `.yaml` of the same name is beside them: tensors cannot say.
        vae: a file, or a folder with one, whose encoder and decoder are taken instead.
        ema: take the UNet's moving average where a single file has both.
        variant: such as "fp16": which weights of a diffusers folder to take.

    Raises:
        FileNotFoundError: the folder lacks files; all of them are named.
        CheckpointError: there is no such source; or a file is damaged, unsupported or something
            else, which is named.
        ValueError: `prediction` or a network's name is none of the above.
    """
    if prediction not in (None, "epsilon", "v"):
        raise ValueError(f"prediction must be 'epsilon' or 'v', not {prediction!r}")
    prediction = prediction or _prediction_beside(source)
    checkpoint = _open(source, config, prediction, ema, variant)
    if config is not None:
        checkpoint = replace(checkpoint, config=config)
    if vae is not None:
        parts = _open_vae(Path(vae), checkpoint.config)
        checkpoint = replace(checkpoint, parts={**checkpoint.parts, **parts})
    if not isinstance(source, Mapping):
        _check_whole(checkpoint, source)
    if prediction is not None:
        schedule = replace(checkpoint.config.schedule, prediction=prediction)
        checkpoint = replace(checkpoint, config=replace(checkpoint.config, schedule=schedule))
    return checkpoint


def _open(
    source: Source,
    config: ModelConfig | None,
    prediction: str | None,
    ema: bool,
    variant: str | None,
) -> Checkpoint:
    if isinstance(source, Mapping):
        return _open_files(dict(source), "files", config, prediction, ema)
    if isinstance(source, str) and source in PRESETS:
        return open_folder(preset_folder(source))
    path = Path(source)
    if str(source) and path.is_dir():  # Path("") would be the working directory
        return _open_folder(path, config, prediction, variant)
    if path.is_file():
        return _open_files({None: path}, path.stem, config, prediction, ema)
    known = (
        f"Give a preset ({', '.join(PRESETS)}), a folder in the diffusers layout or with Keras's "
        "h5 files, or a single file."
    )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(
            f"There is no folder {source}. If it is a model on a hub: this version loads local "
            f"models only; download all of its files first. {known}"
        )
    raise CheckpointError(f"Unknown weights {str(source)!r}: no preset, folder or file. {known}")


def _open_folder(
    folder: Path, config: ModelConfig | None, prediction: str | None, variant: str | None
) -> Checkpoint:
    """A folder in the diffusers layout, or one of h5 files with a network each."""
    if any((folder / name).exists() for name in ("model_index.json", "unet", "text_encoder")):
        return open_folder(folder, variant)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    h5 = {path: open_tensors(path) for path in files if _begins_with(path, H5_MAGIC)}
    if not h5:
        others = [path.name for path in files if path.suffix in (".ckpt", ".safetensors", ".pt")]
        raise CheckpointError(
            f"{folder} is a folder without a model: no model_index.json (diffusers) and no h5 "
            f"files (Keras). {'Give a file: ' + ', '.join(others[:10]) if others else ''}".rstrip()
        )
    paths: dict[str | None, Path] = {}
    for path, file in h5.items():
        part = keras_h5.part(file)
        if part in paths:
            raise CheckpointError(
                f"{folder} has the {part} in {paths[part].name} and in {path.name}; give the files "
                f"to take by network, {{{part!r}: …, …}}."
            )
        paths[part] = path
    return _open_files(paths, folder.resolve().name, config, prediction, ema=False)


def _open_files(
    paths: dict[str | None, Path],
    name: str,
    config: ModelConfig | None,
    prediction: str | None,
    ema: bool,
) -> Checkpoint:
    """Files by the network to take from each; None: all that it holds."""
    if unknown := paths.keys() - {None, *PARTS}:
        raise ValueError(f"there is no network {unknown.pop()!r}; there are {', '.join(PARTS)}")
    files = {part: open_tensors(path) for part, path in paths.items()}
    layouts = {part: find_layout(file) for part, file in files.items()}
    config = config or replace(find_config(files.values(), prediction), name=name)
    parts: dict[str, tuple[TensorFile, PartTable]] = {}
    for wanted, file in files.items():
        held = layouts[wanted].tables(config, file, ema)
        if wanted is not None and wanted not in held:
            raise CheckpointError(f"{file.path} does not hold the {wanted}, but {_list(held)}.")
        parts |= {part: (file, table) for part, table in held.items() if wanted in (None, part)}
    return Checkpoint(config, parts)


def _open_vae(path: Path, config: ModelConfig) -> dict[str, tuple[TensorFile, PartTable]]:
    if path.is_dir():  # what is "vae/…" in a whole model
        name = find_weights("decoder", lambda name: (path / Path(name).name).exists())
        if name is None:
            raise FileNotFoundError(f"{path} has no {Path(FILES['decoder']).name}{ENDINGS[0]}.")
        path /= Path(name).name
    file = open_tensors(path)
    held = find_layout(file).tables(config, file, False)
    if not {"encoder", "decoder"} <= held.keys():
        raise CheckpointError(f"{path} is no autoencoder: it holds {_list(held)}.")
    return {part: (file, held[part]) for part in ("encoder", "decoder")}


def _check_whole(checkpoint: Checkpoint, source: Source) -> None:
    """The encoder may be missing: pictures from text do without."""
    held = checkpoint.parts
    if missing := [part for part in PARTS if part not in held and part != "encoder"]:
        raise CheckpointError(
            f"{source} is no whole model: it holds {_list(held)}, and no {_list(missing)}. Give "
            "the folder or file that has them, or files by network."
        )


def _prediction_beside(source: Source) -> Literal["v"] | None:
    """What the `.yaml` of Stability's that is beside a single file says: v, or nothing."""
    if isinstance(source, Mapping) or not Path(source).is_file():
        return None
    path = Path(source).with_suffix(".yaml")
    if not path.is_file() or path.stat().st_size > MAX_YAML:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    return "v" if re.search(r"^\s*parameterization:\s*[\"']?v\b", text, re.MULTILINE) else None


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing of Stable Diffusion"
