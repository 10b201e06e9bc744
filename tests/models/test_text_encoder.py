"""What each of the text encoder's states depends on, and its activations."""

import math
from dataclasses import replace

import keras
import numpy as np
import pytest
from tiny import TINY

from stable_diffusion_tf.compile import training_step
from stable_diffusion_tf.models import TextEncoder
from stable_diffusion_tf.training.ema import values

IDS = np.random.default_rng(0).integers(49406, size=(2, 9), dtype=np.int32)


@pytest.fixture(scope="module")
def encoder():
    keras.utils.set_random_seed(0)
    return TextEncoder(TINY.text_encoder)


def states(encoder, ids):
    return keras.ops.convert_to_numpy(encoder(ids))


@pytest.mark.parametrize("k", [0, 4, 8])
def test_a_token_changes_only_its_own_state_and_later_ones(encoder, k):
    changed = IDS.copy()
    changed[:, k] += 1
    before, after = states(encoder, IDS), states(encoder, changed)
    np.testing.assert_allclose(after[:, :k], before[:, :k], atol=1e-6)
    assert (abs(after - before)[:, k:].max(axis=-1) > 1e-3).all()


def test_the_states_of_a_prefix_are_those_of_the_whole(encoder):
    np.testing.assert_allclose(states(encoder, IDS[:, :5]), states(encoder, IDS)[:, :5], atol=1e-6)


def test_one_that_ends_early_shares_the_weights(encoder):
    np.testing.assert_array_equal(states(encoder.skipping(1), IDS), states(encoder, IDS))
    early = encoder.skipping(2)
    assert {id(w) for w in early.weights} < {id(w) for w in encoder.weights}
    assert len(early.weights) == len(encoder.weights) - 16  # of the last layer
    assert abs(states(early, IDS) - states(encoder, IDS)).max() > 1e-3


FORMULAS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_the_activation_is_the_one_of_the_config(activation):
    keras.utils.set_random_seed(0)
    model = TextEncoder(replace(TINY.text_encoder, activation=activation))
    fc1, fc2 = (model.get_layer(f"encoder.layers.0.mlp.fc{i}") for i in (1, 2))
    fc1.kernel.assign(4 * fc1.kernel)  # far enough from 0 for the two to differ
    before, after = map(
        keras.ops.convert_to_numpy, keras.Model(model.inputs[0], [fc1.output, fc2.input])(IDS)
    )
    for name, formula in FORMULAS.items():
        error = abs(after - formula(before.astype(np.float64))).max()
        assert error < 1e-6 if name == activation else error > 1e-2


def test_a_tokens_gradients_add_up_in_float32_under_mixed_precision():
    """In bfloat16 they would stop growing at 256; a batch pads thousands of times."""
    encoder = TextEncoder(TINY.text_encoder, "mixed_bfloat16")
    layer = encoder.get_layer("embeddings.token_embedding")
    start = values([layer.embeddings])[0]
    step = training_step(
        lambda ids: keras.ops.sum(keras.ops.cast(layer(ids), "float32")),
        [layer.embeddings],
        keras.optimizers.SGD(1.0),
    )
    step(np.full((10, 77), 3, np.int32))
    change = values([layer.embeddings])[0] - start
    np.testing.assert_allclose(change[3], -770, rtol=1e-5)
    assert not change[:3].any() and not change[4:].any()
