"""On JAX the package needs no TensorFlow: neither to train nor to generate."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

PROGRAM = """
import sys
sys.modules["tensorflow"] = None  # importing it fails, as where it is not installed

from pathlib import Path
import numpy as np
from small import run
from tiny import TINY
from stable_diffusion_tf import StableDiffusion
from stable_diffusion_tf.models import Decoder, Encoder
from stable_diffusion_tf.training.loop import train
from stable_diffusion_tf.training.loss import autoencoder_loss
from stable_diffusion_tf.training.optimizer import adamw

model, folder = map(Path, sys.argv[1:])
run(folder / "diffusion", 1)

models = Encoder(TINY.autoencoder), Decoder(TINY.autoencoder)
images, noise = np.random.default_rng(0).random((1, 8, 8, 3), "f"), np.zeros((1, 4, 4, 4), "f")
train(
    autoencoder_loss(*models), lambda step: (images, noise), models, adamw(1e-3, 1),
    steps=1, folder=folder / "autoencoder", progress=False,
)

sd = StableDiffusion.from_pretrained(model)
assert sd.generate("a cat", num_steps=1, seed=0, progress=False).shape == (1, 32, 32, 3)
"""


@pytest.mark.full
def test_training_and_generating_on_jax_need_no_tensorflow(tiny_model, tmp_path):
    paths = [str(TESTS), str(TESTS / "training"), str(TESTS.parent)]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_model), str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
