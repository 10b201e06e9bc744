"""A small diffusion training, the same on every backend; also runs as a program to be killed.

python small.py FOLDER STEPS
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np

from stable_diffusion_tf.config import ScheduleConfig, TextEncoderConfig, UNetConfig
from stable_diffusion_tf.models import TextEncoder, UNet
from stable_diffusion_tf.training.data import noisy_batches
from stable_diffusion_tf.training.ema import values
from stable_diffusion_tf.training.loop import train
from stable_diffusion_tf.training.loss import diffusion_loss
from stable_diffusion_tf.training.optimizer import adamw

# Little to compile and to save: a process of it is started and killed many times.
TEXT = TextEncoderConfig(vocab_size=256, width=32, layers=1, heads=4, mlp_width=64)
UNET = UNetConfig(widths=(32,), resnets=1, attention=(True,), heads=(4,), context_width=32)


def tokenize(texts):
    """Bytes as ids: (B, 77)."""
    padded = [text.ljust(TEXT.max_length).encode() for text in texts]
    return np.frombuffer(b"".join(padded), np.uint8).reshape(len(texts), -1).astype(np.int32)


def run(folder: Path, steps: int, stop: int | None = None, dtype="float32", **options):
    """Trains up to `stop` of `steps` -> the models."""
    keras.utils.set_random_seed(0)
    models = TextEncoder(TEXT, dtype), UNet(UNET, dtype)
    latents = np.random.default_rng(0).standard_normal((2, 8, 4, 4, 4), dtype=np.float32)
    batch = noisy_batches(
        latents[0],
        0.1 * np.abs(latents[1]),
        caption=lambda i, rng: f"picture {i} of {rng.integers(10)}",
        tokenize=tokenize,
        schedule=ScheduleConfig(),
        batch_size=2,
        seed=0,
    )
    train(
        diffusion_loss(*models, "epsilon"),
        batch,
        models,
        adamw(1e-3, steps, loss_scaling=dtype == "mixed_float16"),
        steps=stop or steps,
        folder=folder,
        **{"save_every": 2, "log_every": 1, "progress": False, **options},
    )
    return models


def weights(models) -> list[np.ndarray]:
    return values(variable for model in models for variable in model.variables)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
