import numpy as np
import pytest

from stable_diffusion_tf.preview import Preview, linear_decoder


def test_a_preview_is_an_array_that_is_computed_once():
    computed = []

    def compute():
        computed.append(1)
        return np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3)

    preview = Preview(compute)
    assert not hasattr(preview, "__array_interface__")  # asking for which must not compute
    assert computed == []
    expected = np.arange(12).reshape(2, 1, 2, 3)
    np.testing.assert_array_equal(preview, expected)
    np.testing.assert_array_equal(preview[1], expected[1])
    np.testing.assert_array_equal([*preview], expected)
    assert np.asarray(preview, np.float32).dtype == np.float32
    assert (len(preview), preview.shape, preview.dtype) == (2, (2, 1, 2, 3), np.uint8)
    assert preview.mean() == 5.5
    assert computed == [1]
    assert not hasattr(preview, "colour")


@pytest.mark.parametrize("channels", [4, 16])
def test_a_decoder_that_is_linear_is_found(channels):
    rng = np.random.default_rng(1)
    colours = rng.uniform(-0.02, 0.02, (channels, 3))
    detail = rng.uniform(-0.1, 0.1, (8, 8, 3))
    detail -= detail.mean((0, 1))

    def mean(latents):
        return 0.5 + latents @ colours

    def decode(latents):
        pictures = mean(latents).repeat(8, 1).repeat(8, 2)
        return pictures + np.tile(detail, (*latents.shape[1:3], 1))

    decoder = linear_decoder(decode, channels, 8)
    latents = rng.standard_normal((2, 3, 5, channels), np.float32)
    np.testing.assert_allclose(decoder(latents), mean(latents), rtol=0, atol=1e-5)
    assert decoder(100 * latents).min() == 0 and decoder(100 * latents).max() == 1
