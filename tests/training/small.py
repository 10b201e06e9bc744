"""A small diffusion training, the same on every backend; also runs as a program to be killed.

python small.py FOLDER STEPS
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
from tiny import TINY

from stable_diffusion_tf.models import TextEncoder, UNet
from stable_diffusion_tf.tokenizer import Tokenizer
from stable_diffusion_tf.training.data import noisy_batches
from stable_diffusion_tf.training.ema import values
from stable_diffusion_tf.training.loop import train
from stable_diffusion_tf.training.loss import diffusion_loss
from stable_diffusion_tf.training.optimizer import adamw


def run(folder: Path, steps: int, stop: int | None = None, dtype="float32", **options):
    """Trains up to `stop` of `steps` -> the models."""
    keras.utils.set_random_seed(0)
    models = TextEncoder(TINY.text_encoder, dtype), UNet(TINY.unet, dtype)
    latents = np.random.default_rng(0).standard_normal((2, 8, 4, 4, 4), dtype=np.float32)
    batch = noisy_batches(
        latents[0],
        0.1 * np.abs(latents[1]),
        caption=lambda i, rng: f"picture {i} of {rng.integers(10)}",
        tokenize=Tokenizer().tokenize,
        schedule=TINY.schedule,
        batch_size=2,
        seed=0,
    )
    train(
        diffusion_loss(*models, TINY.schedule.prediction),
        batch,
        models,
        adamw(1e-3, steps),
        steps=stop or steps,
        folder=folder,
        **{"save_every": 2, "log_every": 1, "progress": False, **options},
    )
    return models


def weights(models) -> list[np.ndarray]:
    return values(variable for model in models for variable in model.variables)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
