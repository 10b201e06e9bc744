"""The autoencoder's sizes, and where the latents' scale is applied."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from tiny import TINY

from stable_diffusion_tf.models import Decoder, Encoder

CONFIG = replace(TINY.autoencoder, widths=(32, 32, 64))  # 4 pixels per latent
RESCALED = replace(CONFIG, scale=0.5)
RNG = np.random.default_rng(0)


def pair(model):
    """Two models that differ by their scale only."""
    keras.utils.set_random_seed(0)
    first, second = model(CONFIG), model(RESCALED)
    for variable, value in zip(second.weights, first.weights, strict=True):
        variable.assign(value.value)
    return first, second


@pytest.fixture(scope="module")
def encoders():
    return pair(Encoder)


@pytest.fixture(scope="module")
def decoders():
    return pair(Decoder)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (6, 2)])
def test_one_latent_per_square_of_pixels(encoders, decoders, height, width):
    size = (CONFIG.factor * height, CONFIG.factor * width)
    moments = encoders[0](np.zeros((2, *size, 3), np.float32))
    assert moments.shape == (2, height, width, 2 * CONFIG.latent_channels)
    latents = np.zeros((2, height, width, CONFIG.latent_channels), np.float32)
    assert decoders[0](latents).shape == (2, *size, 3)


def test_the_encoder_does_not_scale(encoders):
    images = RNG.uniform(-1, 1, (1, 8, 12, 3)).astype(np.float32)
    first, second = (keras.ops.convert_to_numpy(encoder(images)) for encoder in encoders)
    np.testing.assert_array_equal(first, second)


def test_the_decoder_divides_by_the_scale(decoders):
    latents = RNG.standard_normal((1, 2, 3, 4), dtype=np.float32)
    first, second = (
        keras.ops.convert_to_numpy(decoder(latents * decoder.config.scale)) for decoder in decoders
    )
    np.testing.assert_allclose(first, second, atol=1e-5)
    unscaled = keras.ops.convert_to_numpy(decoders[1](latents * CONFIG.scale))
    assert abs(unscaled - first).max() > 1e-2
