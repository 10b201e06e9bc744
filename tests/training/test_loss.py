"""Losses against values known by hand."""

import keras
import numpy as np
import pytest
from keras import ops

from stable_diffusion_tf.config import AutoencoderConfig
from stable_diffusion_tf.training.loss import (
    autoencoder_loss,
    denoised_loss,
    diffusion_loss,
    min_snr_weight,
)

RNG = np.random.default_rng(0)
LATENTS, NOISE = RNG.standard_normal((2, 3, 4, 4, 4), dtype=np.float32)
ALPHA, SIGMA = np.full((3, 1, 1, 1), 0.6, "f"), np.full((3, 1, 1, 1), 0.8, "f")
TIMESTEPS, IDS = np.array([1.0, 2.0, 3.0], "f"), np.zeros((3, 77), np.int32)
V = 0.6 * NOISE - 0.8 * LATENTS


def loss_of(prediction, norm, answer, **options):
    loss = diffusion_loss(
        lambda ids: ids, lambda inputs: ops.convert_to_tensor(answer), prediction, norm, **options
    )
    return float(loss(LATENTS, NOISE, TIMESTEPS, ALPHA, SIGMA, IDS))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("prediction", "right"), [("epsilon", NOISE), ("v", V)])
def test_the_right_answer_costs_nothing(prediction, right, norm):
    assert loss_of(prediction, norm, right) == pytest.approx(0, abs=1e-10)


def test_norms_of_a_constant_error():
    assert loss_of("epsilon", "l1", NOISE + 0.5) == pytest.approx(0.5, rel=1e-5)
    assert loss_of("epsilon", "l2", NOISE + 0.5) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("norm", "even", "uneven"), [("l1", (1 + 2 + 4) / 3 * 0.5, 0.5 / 3), ("l2", 7 * 0.25, 0.25 / 3)]
)
def test_scales_weigh_what_areas_have_in_common(norm, even, uneven):
    checks = 1 - 2 * (np.indices((4, 4)).sum(0) % 2)[..., None]  # whose means over 2x2 are 0
    assert loss_of("v", norm, V + 0.5, scales=3) == pytest.approx(even, rel=1e-5)
    assert loss_of("v", norm, V + 0.5 * checks, scales=3) == pytest.approx(uneven, rel=1e-5)


def test_scales_are_of_channels_last_latents_that_have_them():
    expected = loss_of("v", "l2", V + NOISE, scales=3)
    keras.config.set_image_data_format("channels_first")
    try:
        assert loss_of("v", "l2", V + NOISE, scales=3) == expected
    finally:
        keras.config.set_image_data_format("channels_last")
    with pytest.raises(ValueError, match=r"latents of \(4, 4\) have no means at 4 scales"):
        loss_of("v", "l2", V, scales=4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_white_noise_counts_alike_at_every_scale(norm):
    white = np.random.default_rng(1).standard_normal((8, 32, 32, 4), dtype=np.float32)
    latents, noise = np.zeros((2, *white.shape), np.float32)
    alone, several = (
        diffusion_loss(
            lambda ids: ids, lambda x: ops.convert_to_tensor(white), "epsilon", norm, scales=scales
        )(latents, noise, np.zeros(8), np.float32(0.6), np.float32(0.8), IDS)
        for scales in (1, 4)
    )
    assert float(several) == pytest.approx(float(alone), rel=0.05)


@pytest.mark.parametrize(("prediction", "right"), [("epsilon", NOISE), ("v", V)])
@pytest.mark.parametrize("gamma", [0.25, 5.0])  # SNR is 0.5625, between them
def test_min_snr_weighs_the_error_of_x0(prediction, right, gamma):
    """x0 is off by sigma (v) or sigma / alpha (epsilon) times what the network is off by."""
    snr = 0.6**2 / 0.8**2
    x0_error = 0.5 * {"v": 0.8, "epsilon": 0.8 / 0.6}[prediction]
    loss = loss_of(prediction, "l2", right + 0.5, min_snr=gamma)
    assert loss == pytest.approx(min(snr, gamma) * x0_error**2, rel=1e-5)


@pytest.mark.parametrize(("prediction", "weights"), [("v", [0, 0]), ("epsilon", [1, 0])])
def test_min_snr_weights_of_pure_noise_and_of_none(prediction, weights):
    alpha, sigma = np.array([0.0, 1.0], "f"), np.array([1.0, 0.0], "f")
    found = min_snr_weight(*map(ops.convert_to_tensor, (alpha, sigma)), prediction, gamma=5.0)
    np.testing.assert_array_equal(found, weights)


def test_the_network_sees_the_noisy_latents():
    seen = []

    def network(inputs):
        seen.extend(inputs)
        return ops.zeros((3, 4, 4, 4))

    diffusion_loss(lambda ids: "context", network, "epsilon")(
        LATENTS, NOISE, TIMESTEPS, ALPHA, SIGMA, IDS
    )
    np.testing.assert_allclose(seen[0], 0.6 * LATENTS + 0.8 * NOISE, rtol=1e-6)
    assert seen[1] is TIMESTEPS
    assert seen[2] == "context"


class Decoder:
    """Draws one colour everywhere."""

    config = AutoencoderConfig()

    def __init__(self, colour):
        self.colour = colour

    def __call__(self, latents):
        return ops.full((2, 8, 8, 3), self.colour)


def test_autoencoder_loss_of_a_shifted_picture_is_its_distance():
    images = np.zeros((2, 8, 8, 3), "f")
    moments = np.zeros((2, 1, 1, 8), "f")  # the prior itself: KL 0
    loss = autoencoder_loss(lambda _: ops.convert_to_tensor(moments), Decoder(0.25), kl_weight=1.0)
    assert float(loss(images, np.zeros((2, 1, 1, 4), "f"))) == pytest.approx(0.25)


def test_autoencoder_loss_counts_missing_edges():
    images = np.zeros((2, 8, 8, 3), "f")
    images[:, :, 4:] = 1.0  # one edge: 1 of 7 horizontal differences in each row
    moments = np.zeros((2, 1, 1, 8), "f")
    loss = autoencoder_loss(lambda _: ops.convert_to_tensor(moments), Decoder(0.5), edge_weight=2.0)
    assert float(loss(images, np.zeros((2, 1, 1, 4), "f"))) == pytest.approx(0.5 + 2.0 / 7)


def test_the_decoder_learns_from_what_the_network_makes_of_noisy_latents():
    loss = denoised_loss(
        lambda ids: ids, lambda inputs: ops.convert_to_tensor(V), lambda x0: x0[..., :3], "v"
    )
    arguments = LATENTS, NOISE, TIMESTEPS, ALPHA, SIGMA, IDS  # of which V makes LATENTS again
    assert float(loss(*arguments, LATENTS[..., :3])) == pytest.approx(0, abs=1e-6)
    assert float(loss(*arguments, LATENTS[..., :3] - 0.5)) == pytest.approx(0.5)


def test_an_adversary_sees_the_artworks_then_what_is_decoded():
    loss = denoised_loss(
        lambda ids: ids,
        lambda inputs: ops.convert_to_tensor(V),
        lambda x0: x0[..., :3],
        "v",
        adversary=lambda images, decoded: ops.mean(images) + 3 * ops.mean(decoded),
    )
    shown = LATENTS[..., :3] - 0.5
    expected = 0.5 + shown.mean() + 3 * LATENTS[..., :3].mean()
    found = float(loss(LATENTS, NOISE, TIMESTEPS, ALPHA, SIGMA, IDS, shown))
    assert found == pytest.approx(expected, rel=1e-5)


def test_kl_of_a_unit_gaussian_at_one():
    images = np.zeros((2, 8, 8, 3), "f")
    moments = np.concatenate([np.ones((2, 1, 1, 4)), np.zeros((2, 1, 1, 4))], axis=-1).astype("f")
    loss = autoencoder_loss(lambda _: ops.convert_to_tensor(moments), Decoder(0.0), kl_weight=1.0)
    assert float(loss(images, np.zeros((2, 1, 1, 4), "f"))) == pytest.approx(4 * 0.5)
