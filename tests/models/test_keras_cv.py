"""Our networks against KerasCV's, an independent implementation, at the published sizes, live."""

import keras
import numpy as np
import pytest
import synth

from stable_diffusion_tf.config import AutoencoderConfig, TextEncoderConfig
from stable_diffusion_tf.models import Decoder, TextEncoder

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def variables(model):
    """Those of one of our models, in KerasCV's order: shortcuts after the block's second conv."""
    layers = [layer for layer in model.layers if layer.weights]
    places = {layer.name: i for i, layer in enumerate(layers)}
    layers.sort(key=lambda x: places[x.name] + 1.5 * x.name.endswith("conv_shortcut"))
    return [variable for layer in layers for variable in layer.weights]


def stand_in(path, shape):
    n = synth.normal(path, shape)
    if len(shape) == 1:
        return 1 + 0.1 * n if path.endswith("gamma") else 0.1 * n
    return n / np.float32(np.sqrt(np.prod(shape[:-1])))


def fill(ours, theirs):
    """Gives both the same weights; some of our dense layers are 1x1 convolutions there."""
    for variable, peer in zip(variables(ours), theirs.weights, strict=True):
        value = stand_in(variable.path, variable.shape)
        variable.assign(value)
        peer.assign(value.reshape(peer.shape))


def test_text_encoder():
    from keras_cv.src.models.stable_diffusion import text_encoder

    ours = TextEncoder(TextEncoderConfig(vocab_size=1000))  # a short table looks up as a long one
    theirs = text_encoder.TextEncoder(77, vocab_size=1000, download_weights=False)
    fill(ours, theirs)
    ids = np.random.default_rng(0).integers(1000, size=(2, 77), dtype=np.int32)
    positions = np.tile(np.arange(77, dtype=np.int32), (2, 1))
    assert synth.relative_error(ours(ids), theirs([ids, positions])) <= 2e-5


def test_decoder():
    from keras_cv.src.models.stable_diffusion import decoder

    ours = Decoder(AutoencoderConfig())
    theirs = decoder.Decoder(32, 16, download_weights=False)
    for layer in theirs._flatten_layers():
        if isinstance(layer, keras.layers.GroupNormalization):
            layer.epsilon = 1e-6  # as published; KerasCV's 1e-5 alone makes a difference of 2e-5
    fill(ours, theirs)
    latents = 0.18215 * synth.inputs("keras_cv", (1, 4, 2, 4))
    assert synth.relative_error(ours(latents), theirs(latents)) <= 2e-5
