"""Folders and files on this machine -> an opened checkpoint, by what they are."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stable_diffusion_tf.checkpoints import compvis, keras_h5
from stable_diffusion_tf.checkpoints.config_json import PREDICTIONS, read_autoencoder
from stable_diffusion_tf.checkpoints.diffusers import ENDINGS, FILES, find_weights, open_folder
from stable_diffusion_tf.checkpoints.fit import Checkpoint, Part
from stable_diffusion_tf.checkpoints.layouts import find_config, find_layout
from stable_diffusion_tf.checkpoints.readers import CheckpointError, TensorFile
from stable_diffusion_tf.checkpoints.tensors import H5_MAGIC, first_bytes, open_tensors
from stable_diffusion_tf.config import ModelConfig

log = logging.getLogger(__name__)

PARTS = tuple(FILES)  # the networks
MAX_YAML = 2**20  # bytes
OPTIONS = {
    "ema": "a single CompVis file can hold the UNet's moving average beside its weights",
    "variant": "a folder or a repository in the diffusers layout has variants",
    "config": "files without a config of their own take one",
}


def open_path(
    path: Path,
    config: ModelConfig | None = None,
    prediction: str | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """Open a folder or a single file. Arguments and errors as of `catalog.open_checkpoint`."""
    if path.is_dir():
        return _open_folder(path, config, prediction, ema, variant)
    refuse_options(path, variant=variant)
    return _open_files({None: path}, path.stem, config, prediction, ema)


def open_parts(
    paths: Mapping[Any, Any],
    config: ModelConfig | None = None,
    prediction: str | None = None,
    ema: bool = False,
) -> Checkpoint:
    """Open files by the network to take from each. Arguments and errors as of `open_checkpoint`."""
    if unknown := [part for part in paths if part not in PARTS]:
        raise ValueError(f"there is no network {unknown[0]!r}; there are {', '.join(PARTS)}")
    return _open_files(dict(paths), "files", config, prediction, ema)


def refuse_options(source: Any, **options: Any) -> None:
    """Raises ValueError if one is given of `OPTIONS`, which mean nothing for this source."""
    for name, value in options.items():
        if value:
            raise ValueError(
                f"`{name}` means nothing for {source}: only {OPTIONS[name]}. Leave it out."
            )


def _open_folder(
    folder: Path,
    config: ModelConfig | None,
    prediction: str | None,
    ema: bool,
    variant: str | None,
) -> Checkpoint:
    """A folder in the diffusers layout, or one of h5 files with a network each."""
    if any((folder / name).exists() for name in ("model_index.json", "unet", "text_encoder")):
        refuse_options(folder, ema=ema, config=config)
        return open_folder(folder, variant)
    refuse_options(folder, variant=variant)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    h5 = {path: open_tensors(path) for path in files if first_bytes(path).startswith(H5_MAGIC)}
    if not h5:
        others = [path.name for path in files if path.suffix in (".ckpt", ".safetensors", ".pt")]
        remedy = f"Give a file: {', '.join(others[:10])}" if others else ""
        if (folder.parent / "model_index.json").exists():
            remedy = f"It is a part of {folder.parent}; give that."
        raise CheckpointError(
            f"{folder} is a folder without a model: no model_index.json (diffusers) and no h5 "
            f"files (Keras). {remedy}".rstrip()
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
    return _open_files(paths, folder.resolve().name, config, prediction, ema)


def _open_files(
    paths: dict[str | None, Path],
    name: str,
    config: ModelConfig | None,
    prediction: str | None,
    ema: bool,
) -> Checkpoint:
    """Files by the network to take from each; None: all that it holds."""
    files = {part: open_tensors(path) for part, path in paths.items()}
    layouts = {part: find_layout(file) for part, file in files.items()}
    if not any(layout.tables is compvis.tables for layout in layouts.values()):
        refuse_options(", ".join(str(file.path) for file in files.values()), ema=ema)
    is_assumed = False
    if config is None:
        if prediction is None:
            said = (_prediction(file) for file in files.values())
            prediction = next(filter(None, said), None)
        config = replace(find_config(files.values(), prediction), name=name)
        is_assumed = prediction is None and config.unet.linear_projection
    if prediction is not None:
        config = replace(config, schedule=replace(config.schedule, prediction=prediction))
    parts: dict[str, Part] = {}
    for wanted, file in files.items():
        held = layouts[wanted].tables(config, file, ema)
        if wanted is not None and wanted not in held:
            raise CheckpointError(f"{file.path} does not hold the {wanted}, but {listing(held)}.")
        taken = {p: partial(t.match, file=file) for p, t in held.items() if wanted in (None, p)}
        if "unet" in taken and is_assumed:
            log.warning(
                "%s: nothing says what this model of Stable Diffusion 2 predicts; taken as "
                "epsilon, as those of 512 pixels do. For one of 768 pixels give prediction 'v'.",
                file.path,
            )
        parts |= taken
    return Checkpoint(config, parts)


def open_vae(path: Path, config: ModelConfig) -> Checkpoint:
    """The encoder and the decoder of a file, or of a folder with one, for a model of this config.

    The folder may be a whole model's. In the diffusers layout a `config.json` beside them says what
    they are, with the scale of their latents; else they are taken for what the model's own are.

    Raises:
        FileNotFoundError, CheckpointError: there is none; or it is something else or damaged, or
            its latents are not the model's.
    """
    stem = Path(FILES["decoder"]).name
    if (path / "vae").is_dir():
        path /= "vae"
    if path.is_dir():
        name = find_weights("decoder", lambda name: (path / Path(name).name).exists())
        if name is None:
            raise FileNotFoundError(f"{path} has no {stem}{ENDINGS[0]}.")
        path /= Path(name).name
    file = open_tensors(path)
    held = find_layout(file).tables(config, file, False)
    if not {"encoder", "decoder"} <= held.keys():
        raise CheckpointError(f"{path} is no autoencoder: it holds {listing(held)}.")
    beside = path.with_name("config.json")
    if path.name.startswith(stem) and beside.exists():
        own, needed = read_autoencoder(beside), config.autoencoder
        if (own.latent_channels, own.factor) != (needed.latent_channels, needed.factor):
            raise CheckpointError(
                f"{beside}: its latents have {own.latent_channels} channels and {own.factor} "
                f"pixels a side; {config.name} needs {needed.latent_channels} and {needed.factor}. "
                "Give an autoencoder made for it."
            )
        config = replace(config, autoencoder=own)
    return Checkpoint(
        config, {part: partial(held[part].match, file=file) for part in ("encoder", "decoder")}
    )


def listing(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing of Stable Diffusion"


def _prediction(file: TensorFile) -> str | None:
    """What the UNet predicts, as the file's own notes or Stability's config beside it say."""
    said = getattr(file, "metadata", {}).get("modelspec.prediction_type")
    config = file.path.with_suffix(".yaml")
    if said is None and config.is_file() and config.stat().st_size < MAX_YAML:
        text = config.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
        said = found[1] if found else None
    return {"v": "v", "eps": "epsilon", **PREDICTIONS}.get(said)
