"""What a user has set for Keras as a whole has no part in the networks."""

import keras
import numpy as np
import pytest
from tiny import TINY

from stable_diffusion_tf.checkpoints.load import MODELS, build_part
from stable_diffusion_tf.models import Decoder, Encoder, TextEncoder, UNet
from stable_diffusion_tf.training.adversary import Discriminator


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
        (Discriminator(8, "float32"), image),
    )
    return [keras.ops.convert_to_numpy(network(given)) for network, given in networks]


def test_networks_are_the_same_whatever_is_set(changed):
    expected = outputs()
    changed()
    for found, wanted in zip(outputs(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_paths_of_weights_are_those_of_files_in_any_name_scope():
    with keras.name_scope("mine"):
        within = {part: build_part(TINY, part) for part in MODELS}
        assert keras.Variable(0.0, name="after").path == "mine/after"
    for part, network in within.items():
        paths = [weight.path for weight in network.weights]
        assert paths == [weight.path for weight in build_part(TINY, part).weights]


@pytest.mark.parametrize(
    ("policy", "given"),
    [
        ("mixed_float16", "float32"),
        ("int8_from_float32", "float32"),
        ("float32", "mixed_float16"),
    ],
)
def test_networks_have_the_policy_that_they_are_given(policy, given):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        unet = UNet(TINY.unet, given)
        networks = unet, unet.keeping(), TextEncoder(TINY.text_encoder, given).skipping(2)
    finally:
        keras.config.set_dtype_policy(before)
    assert [network.dtype_policy.name for network in networks] == [given] * 3
    unet.compile("sgd", "mse")
    scaled = isinstance(unet.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (given == "mixed_float16")  # whose small gradients would vanish
