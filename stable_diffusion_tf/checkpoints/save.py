"""Filled models -> a diffusers folder or a CompVis file, which `load` and other programs open."""

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import keras
import ml_dtypes
import numpy as np

from stable_diffusion_tf.checkpoints import compvis, diffusers
from stable_diffusion_tf.checkpoints.catalog import Source, open_checkpoint
from stable_diffusion_tf.checkpoints.config_json import read_config, write_config
from stable_diffusion_tf.checkpoints.fit import LISTED, Table
from stable_diffusion_tf.checkpoints.layouts import BASES, INPUTS, published
from stable_diffusion_tf.checkpoints.load import MODELS, Models, load_parts
from stable_diffusion_tf.checkpoints.readers import CheckpointError, save_safetensors
from stable_diffusion_tf.config import SD_1, ModelConfig
from stable_diffusion_tf.files import atomic_path, check_folder
from stable_diffusion_tf.tokenizer import vocabulary_files

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
FILE = ".safetensors"
OTHER_FILES = (".bin", ".ckpt", ".h5", ".keras", ".pt", ".pth")


def save(models: Models, target: str | os.PathLike, dtype: str = "float32") -> None:
    """Write the four networks, whole or not at all.

    Args:
        models: what `load` gives, or `Models(config, text_encoder, unet, encoder, decoder)`.
        target: a new folder, which gets the diffusers layout, with config and tokenizer; or, if its
            name ends in .safetensors, a new file, which gets that of CompVis's checkpoints.
        dtype: of the stored weights: "float32", "float16" or "bfloat16".

    Raises:
        FileExistsError: there is something at `target`.
        OSError: nothing can be written there.
        ValueError: unknown dtype, or kind of file; a single file of a model whose config is no
            published one; a config that would not be read as it is; or a weight is not finite in
            the dtype.
    """
    target = Path(target)
    check_target(target, dtype, models.config)
    write = write_file if _is_file(target) else write_folder
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            write(models, temporary, dtype)
            _check_free(target)  # of what has come meanwhile
    except FileExistsError:
        raise
    except OSError as error:
        cause = error.strerror or error
        raise OSError(
            f"{target} could not be written: {cause}. Make room, or name another target."
        ) from error


def convert(
    source: Source, target: str | os.PathLike, dtype: str = "float32", **options: Any
) -> None:
    """Load `source` and save it. Arguments and errors as of `open_checkpoint` and `save`."""
    check_target(target, dtype)
    checkpoint = open_checkpoint(source, **options)
    check_target(target, dtype, checkpoint.config)
    save(Models(checkpoint.config, **load_parts(checkpoint, MODELS, "float32")), target, dtype)


def check_target(target: str | os.PathLike, dtype: str, config: ModelConfig | None = None) -> None:
    """Raises, before any work, what `save` would; of a `config`, once it is known."""
    target = Path(target)
    _check_free(target)
    check_folder(target.parent, "name another target")
    if target.suffix.lower() in OTHER_FILES:
        raise ValueError(
            f"{target}: {target.suffix} is not written; name a folder, or end in {FILE}."
        )
    if dtype not in DTYPES:
        raise ValueError(f"Weights are saved as {', '.join(DTYPES)}, not {dtype!r}.")
    if config is None:
        return
    if not _is_file(target):
        check_config(target, config)
    elif lost := _differences(config, _of_a_file(config)):
        raise ValueError(
            f"{target}: a single file has no config, and is read as a published model. This one "
            f"has {lost} instead. Name a folder, which keeps it all."
        )


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists. Name another target, or move it away.")


def _is_file(target: Path) -> bool:
    return target.suffix.lower() == FILE


def check_config(target: Path, config: ModelConfig) -> None:
    """Raises ValueError where a folder of this config would be read as another, or not at all."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write_texts(_config_files(config), folder)
        try:
            read = read_config(folder)
        except CheckpointError as error:
            said = str(error).removeprefix(f"{folder}{os.sep}")
            raise ValueError(f"{target} could not be read again: {said}") from None
    if lost := _differences(config, read):
        raise ValueError(f"{target}: a folder cannot hold {lost}.")


def _of_a_file(config: ModelConfig) -> ModelConfig:
    """The config that a single file of this model's tensors is read with."""
    unet = config.unet
    context = unet.context_width if unet.context_width in BASES else SD_1.unet.context_width
    channels = unet.in_channels if unet.in_channels in INPUTS else SD_1.unet.in_channels
    prediction = config.schedule.prediction  # which the file says
    read = published(context, channels, prediction)
    return replace(read, schedule=replace(read.schedule, prediction=prediction))


def _differences(config: ModelConfig, read: ModelConfig) -> str:
    """What `config` says and `read` does not: "unet.widths = (320,), …"; "" if they agree."""
    said = _values(read)
    lost = [f"{key} = {value}" for key, value in _values(config).items() if value != said[key]]
    return ", ".join([*lost[:LISTED], *["…"][: len(lost) > LISTED]])


def _values(config: ModelConfig) -> dict[str, Any]:
    """All that a config says but its name, which a file has of its own: {"unet.widths": …}."""
    values = {}
    for part, said in asdict(replace(config, name="")).items():
        fields = said if isinstance(said, dict) else {"": said}
        for key, value in fields.items():
            listed = isinstance(value, list)  # which a config may have for a tuple
            values[f"{part}.{key}".rstrip(".")] = tuple(value) if listed else value
    return values


def export(
    part: str, model: keras.Model, dtype: str = "float32", table: Table | None = None
) -> dict[str, np.ndarray]:
    """A network's weights by the names of a format, in PyTorch's layout; None: by diffusers'.

    Of a layer with LoRA it is the sum.
    """
    table = table or diffusers.TABLES[part]
    pieces: dict[str, list[np.ndarray]] = {}
    adapted = _adapted(model)
    own = [v for v in model.weights if not v.name.startswith("lora_")]
    for variable in sorted(own, key=table.piece):
        name, _, axes = table.tensor(variable)
        value = np.asarray(variable)
        if variable.path in adapted:
            value = value + _product(adapted[variable.path])
        value = value.transpose(np.argsort(axes))
        with np.errstate(over="ignore"):
            value = value.astype(DTYPES[dtype], order="C")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} of the {part} has values that are not finite in {dtype}.")
        pieces.setdefault(name, []).append(value)
    return {
        name: values[0] if len(values) == 1 else np.concatenate(values)  # which would be a copy
        for name, values in pieces.items()
    }


def _adapted(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """The layers that have LoRA, by the path of the weight that it adds to."""
    return {
        re.sub(r"lora_(\w+)_a$", r"\1", weight.path): layer
        for layer in model.layers
        for weight in layer.weights
        if re.fullmatch(r"lora_\w+_a", weight.name)
    }


def _product(layer: keras.layers.Layer) -> np.ndarray:
    """What LoRA adds, in float32: Keras's own sum is rounded to what the layer computes in."""
    a, b = (np.asarray(v) for v in layer.weights if v.name.startswith("lora_"))
    return layer.lora_alpha / layer.lora_rank * (a @ b)


def write_folder(models: Models, folder: Path, dtype: str) -> None:
    """A folder in the diffusers layout, with config and tokenizer."""
    tokenizer = {f"tokenizer/{name}": text for name, text in vocabulary_files().items()}
    _write_texts(_config_files(models.config) | tokenizer, folder)
    for stem in dict.fromkeys(diffusers.FILES.values()):
        tensors = {}
        for part in (part for part in diffusers.FILES if diffusers.FILES[part] == stem):
            tensors |= export(part, getattr(models, part), dtype)
        save_safetensors(tensors, folder / (stem + FILE), {"format": "pt"})


def _config_files(config: ModelConfig) -> dict[str, str]:
    """What `read_config` reads of a folder: {file: its text}."""
    files = write_config(config)
    return {name: json.dumps(values, indent=2) + "\n" for name, values in files.items()}


def _write_texts(texts: dict[str, str], folder: Path) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def write_file(models: Models, path: Path, dtype: str) -> None:
    """One safetensors file by CompVis's names, of any config."""
    tensors = {}
    for part, table in _compvis_tables(models.config).items():
        for name, tensor in export(part, getattr(models, part), dtype, table).items():
            pointwise = re.search(table.pointwise, name)
            tensors[name] = tensor[..., None, None] if pointwise else tensor
    # Nothing in the tensors tells epsilon from v prediction; ours are ModelSpec's words for them.
    prediction = models.config.schedule.prediction
    save_safetensors(tensors, path, {"format": "pt", "modelspec.prediction_type": prediction})


def _compvis_tables(config: ModelConfig) -> dict[str, Table]:
    open_clip = config.text_encoder.activation == "gelu"
    return {
        "text_encoder": compvis.open_clip_table(config) if open_clip else compvis.clip_table(),
        "unet": compvis.unet_table(config, ema=False),
        **compvis.vae_tables(config, compvis.VAE),
    }
