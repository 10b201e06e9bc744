"""What a user has set for Keras as a whole has no part in the networks."""

import keras
import numpy as np
import pytest
from tiny import TINY

from stable_diffusion_tf.models import Decoder, Encoder, TextEncoder, UNet


@pytest.fixture(params=[("image_data_format", "channels_first"), ("floatx", "bfloat16")], ids=str)
def changed(request):
    """Changes one of Keras's settings; it is as before afterwards."""
    name, value = request.param
    set_to = getattr(keras.config, f"set_{name}")
    before = getattr(keras.config, name)()
    yield lambda: set_to(value)
    set_to(before)


def outputs():
    """What each network makes of the same inputs, its weights drawn from the same seed."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    image, latents, states = (
        rng.standard_normal(shape, np.float32)
        for shape in ((1, 16, 12, 3), (1, 8, 6, 4), (1, 77, 32))
    )
    networks = (
        (TextEncoder(TINY.text_encoder, "float32"), np.arange(77)[None]),
        (UNet(TINY.unet, "float32"), [latents, np.float32([981.25]), states]),
        (Encoder(TINY.autoencoder, "float32"), image),
        (Decoder(TINY.autoencoder, "float32"), latents),
    )
    return [keras.ops.convert_to_numpy(network(given)) for network, given in networks]


def test_networks_are_the_same_whatever_is_set(changed):
    expected = outputs()
    changed()
    for found, wanted in zip(outputs(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
