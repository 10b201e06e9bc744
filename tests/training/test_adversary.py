"""The adversary's terms against values and gradients known by hand."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from small import weights

from stable_diffusion_tf.compile import training_step
from stable_diffusion_tf.training.adversary import Discriminator, adversary
from stable_diffusion_tf.training.data import random
from stable_diffusion_tf.training.loop import train
from stable_diffusion_tf.training.loss import denoised_loss
from stable_diffusion_tf.training.optimizer import adamw

WHITE, GREY = np.ones((2, 8, 8, 3), "f"), np.full((2, 8, 8, 3), 0.5, "f")


def colour_sum(weight):
    """A discriminator whose scores are `weight` times the sum of a pixel's colours."""
    model = keras.Sequential([layers.Input((None, None, 3)), layers.Conv2D(1, 1, use_bias=False)])
    model.set_weights([np.full((1, 1, 3, 1), weight, "f")])
    return model


@pytest.mark.parametrize(
    ("scores_a_colour", "expected"),
    [(0.0, 1 + 1), (0.1, 0.7 + 1.15), (1.0, 0 + 2.5), (-1.0, 4 + 0)],  # white 3, grey 1.5 of it
)
def test_the_hinge_loss_of_known_scores(scores_a_colour, expected):
    loss = adversary(colour_sum(scores_a_colour), weight=0.2)(WHITE, ops.convert_to_tensor(GREY))
    assert float(loss) == pytest.approx(expected)


def test_decoder_and_discriminator_learn_apart():
    """Each moves by its own term's gradient alone, in one step of one optimizer."""
    discriminator, colour = colour_sum(0.1), keras.Variable(np.full(3, 0.5, "f"))
    loss = adversary(discriminator, weight=0.2)
    variables = [colour, *discriminator.trainable_variables]
    step = training_step(
        lambda images: loss(images, ops.broadcast_to(colour, images.shape)),
        variables,
        keras.optimizers.SGD(1.0),
    )
    step(WHITE)
    np.testing.assert_allclose(colour, np.full(3, 0.5 + 0.2 * 0.1), rtol=1e-6)
    np.testing.assert_allclose(variables[1], np.full((1, 1, 3, 1), 0.1 + 1 - 0.5), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_score_for_each_eighth_of_the_sides_and_a_loss_in_float32(dtype):
    discriminator = Discriminator(width=16, dtype=dtype)
    images = np.zeros((2, 64, 48, 3), "f")
    assert discriminator(images).shape == (2, 8, 6, 1)
    loss = adversary(discriminator, weight=0.2)(images, ops.convert_to_tensor(images))
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"


# Keras's, which asks TensorFlow's variables for an array as NumPy 1 did.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_discriminator_is_read_again(tmp_path):
    discriminator = Discriminator(width=8, dtype="mixed_bfloat16", name="critic")
    discriminator.save(tmp_path / "critic.keras")
    again = keras.models.load_model(tmp_path / "critic.keras")
    assert type(again) is Discriminator
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype("f")
    scores = [
        ops.convert_to_numpy(ops.cast(one(images), "float32")) for one in (discriminator, again)
    ]
    np.testing.assert_array_equal(*scores)


def test_a_discriminator_learns_to_tell_a_blur():
    rng = np.random.default_rng(0)
    sharp = rng.choice([-1, 1], (8, 16, 16, 3)).astype("f")
    blurred = (sharp + np.roll(sharp, 1, axis=1)) / 2
    keras.utils.set_random_seed(0)
    discriminator = Discriminator(width=16)
    step = training_step(
        adversary(discriminator, weight=0.0),
        discriminator.trainable_variables,
        keras.optimizers.Adam(3e-3),
    )
    first, *_, last = [float(step(sharp, blurred)) for _ in range(30)]
    assert first > 1.5 and last < 0.5


def train_decoder(folder, killed_at=None):
    """Four steps of a decoder of one layer against a discriminator -> both's weights."""
    keras.utils.set_random_seed(0)
    conv = layers.Conv2DTranspose(3, 2, 2, name="conv")
    decoder = keras.Sequential([layers.Input((4, 4, 4)), conv], name="decoder")
    discriminator = Discriminator(width=8)

    def batch(step):
        if step == killed_at:
            raise KeyboardInterrupt
        latents, noise = random(0, step).standard_normal((2, 2, 4, 4, 4), np.float32)
        images = random(1, step).uniform(-1, 1, (2, 8, 8, 3)).astype("f")
        level = np.full((2, 1, 1, 1), 0.5**0.5, "f")
        return latents, noise, np.zeros(2, "f"), level, level, np.zeros((2, 77), "i4"), images

    train(
        denoised_loss(
            lambda ids: ids,
            lambda inputs: inputs[0],
            decoder,
            "epsilon",
            adversary=adversary(discriminator, 0.05),
        ),
        batch,
        [decoder, discriminator],
        adamw(1e-3, 4),
        steps=4,
        folder=folder,
        save_every=2,
        progress=False,
    )
    return weights([decoder, discriminator])


def test_a_killed_run_goes_on_to_the_same_decoder_and_discriminator(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_decoder(tmp_path / "killed", killed_at=3)
    whole, killed = train_decoder(tmp_path / "whole"), train_decoder(tmp_path / "killed")
    for a, b in zip(whole, killed, strict=True):
        np.testing.assert_array_equal(a, b)
