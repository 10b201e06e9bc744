"""Filled models -> a folder in the diffusers layout, which `load` and diffusers open."""

import json
import os
from pathlib import Path

import keras
import ml_dtypes
import numpy as np

from stable_diffusion_tf.checkpoints.config_json import write_config
from stable_diffusion_tf.checkpoints.diffusers import ENDINGS, FILES, TABLES
from stable_diffusion_tf.checkpoints.load import Models
from stable_diffusion_tf.checkpoints.readers import save_safetensors
from stable_diffusion_tf.files import atomic_path

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def save(models: Models, folder: str | os.PathLike, dtype: str = "float16") -> None:
    """Write the four networks and their config to `folder`, whole or not at all.

    Args:
        models: what `load` gives, or `Models(config, text_encoder, unet, encoder, decoder)`.
        folder: a new one.
        dtype: of the stored weights: "float32", "float16" or "bfloat16".

    Raises:
        FileExistsError: there is something at `folder`.
        ValueError: unknown dtype; or a weight is not finite in it.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Name another folder, or move it away.")
    if dtype not in DTYPES:
        raise ValueError(f"Weights are saved as {', '.join(DTYPES)}, not {dtype!r}.")
    with atomic_path(folder) as temporary:
        for name, values in write_config(models.config).items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for stem in dict.fromkeys(FILES.values()):
            tensors = {}
            for part in (part for part in FILES if FILES[part] == stem):
                tensors |= export(part, getattr(models, part), dtype)
            save_safetensors(tensors, temporary / (stem + ENDINGS[0]), {"format": "pt"})


def export(part: str, model: keras.Model, dtype: str = "float32") -> dict[str, np.ndarray]:
    """A network's weights by their diffusers names, in PyTorch's layout."""
    tensors = {}
    for variable in model.weights:
        name, _, axes = TABLES[part].tensor(variable)
        value = np.asarray(variable).transpose(np.argsort(axes))
        with np.errstate(over="ignore"):
            tensors[name] = value.astype(DTYPES[dtype])
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{name} of the {part} has values that are not finite in {dtype}.")
    return tensors
