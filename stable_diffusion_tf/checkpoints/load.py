"""A source -> filled models. Total: every variable filled, every tensor used or ignored by name."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import keras

from stable_diffusion_tf.checkpoints.catalog import PRESETS, preset_folder
from stable_diffusion_tf.checkpoints.diffusers import DiffusersFolder
from stable_diffusion_tf.checkpoints.readers import CheckpointError
from stable_diffusion_tf.config import ModelConfig
from stable_diffusion_tf.models import Decoder, Encoder, TextEncoder, UNet

Source = str | os.PathLike

MODELS = {
    "text_encoder": lambda config, dtype: TextEncoder(config.text_encoder, dtype=dtype),
    "unet": lambda config, dtype: UNet(config.unet, dtype=dtype),
    "encoder": lambda config, dtype: Encoder(config.autoencoder, dtype=dtype),
    "decoder": lambda config, dtype: Decoder(config.autoencoder, dtype=dtype),
}


@dataclass(frozen=True)
class Models:
    """The four networks and their config."""

    config: ModelConfig
    text_encoder: keras.Model
    unet: keras.Model
    encoder: keras.Model
    decoder: keras.Model


def build_part(config: ModelConfig, part: str, dtype: str | None = None) -> keras.Model:
    """One network of `config` with random weights; `part` is a key of `MODELS`."""
    return MODELS[part](config, dtype)


def open_checkpoint(source: Source) -> DiffusersFolder:
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


def load_part(source: Source | DiffusersFolder, part: str, dtype: str | None = None) -> keras.Model:
    """Build one network and fill it: "text_encoder", "unet", "encoder" or "decoder".

    Tensors are read, assigned and freed one at a time. Arguments and errors as of `load`;
    `source` may also be what `open_checkpoint` gave.
    """
    checkpoint = source if isinstance(source, DiffusersFolder) else open_checkpoint(source)
    model = build_part(checkpoint.config, part, dtype)
    for match in checkpoint.match(part, model.weights):
        match.fill()
    return model


def load(source: Source, dtype: str | None = None) -> Models:
    """Build and fill all four networks.

    Args:
        source: as of `open_checkpoint`.
        dtype: Keras dtype policy of the networks, such as "float32", "float16" or
            "mixed_bfloat16"; None is Keras's global one. Weights are converted to its variables'.

    Raises:
        FileNotFoundError, CheckpointError: as of `open_checkpoint`; or tensors are missing, left
            over or of the wrong shape, all listed before any is read; or one is not finite.
    """
    checkpoint = open_checkpoint(source)
    models = {part: build_part(checkpoint.config, part, dtype) for part in MODELS}
    matches, problems = [], []
    for part, model in models.items():
        try:
            matches += checkpoint.match(part, model.weights)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    for match in matches:
        match.fill()
    return Models(checkpoint.config, **models)
