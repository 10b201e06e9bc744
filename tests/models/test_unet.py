"""The UNet's timesteps and sizes; its numbers are compared with the reference's elsewhere."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from keras import ops
from tiny import TINY

from stable_diffusion_tf.models import UNet
from stable_diffusion_tf.models.base import building
from stable_diffusion_tf.models.unet import Sinusoids

DEEP = replace(
    TINY.unet, widths=(32, 32, 64), attention=(True, False, True), heads=(4, 4, 4)
)  # two halvings, so that a side may be rounded up twice


def inputs(timesteps, height=4, width=4):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((len(timesteps), height, width, 4), dtype=np.float32)
    context = rng.standard_normal((len(timesteps), 5, 32), dtype=np.float32)
    return [latents, timesteps, context]


@pytest.fixture
def embedded(monkeypatch):
    """What UNets embedded their timesteps as, the latest last."""
    call, seen = Sinusoids.call, []

    def spy(self, timesteps):
        seen.append(call(self, timesteps))
        return seen[-1]

    monkeypatch.setattr(Sinusoids, "call", spy)
    return seen


def sinusoids(timesteps, width):
    angles = np.outer(timesteps, 10000.0 ** (-np.arange(width // 2) / (width // 2)))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


TIMESTEPS = [
    np.array([981, 1], np.int32),
    np.array([981, 1], np.int64),
    np.array([957.375, 0], np.float32),  # bfloat16 and float16 would round it, bfloat16 981 too
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("policy", ["given", "global"])
def test_timesteps_are_embedded_exactly_under_every_policy(embedded, dtype, policy):
    with building(dtype if policy == "global" else None):
        unet = UNet(TINY.unet, dtype if policy == "given" else None)
        for timesteps in TIMESTEPS:
            predicted = unet(inputs(timesteps))
            assert keras.backend.standardize_dtype(predicted.dtype) == dtype.removeprefix("mixed_")
            found = keras.ops.convert_to_numpy(embedded[-1])
            assert found.dtype == np.float32
            # Within float32's rounding of the angles; float16's of the result would be 2.4e-4.
            np.testing.assert_allclose(found, sinusoids(timesteps, 32), atol=1e-4)


@pytest.fixture(scope="module")
def deep():
    return UNet(DEEP)


@pytest.mark.parametrize("size", [(1, 3), (5, 7), (6, 9), (8, 4)])
def test_the_output_has_the_size_of_the_input(deep, size):
    assert deep(inputs(np.array([1.0, 2.0], np.float32), *size)).shape == (2, *size, 4)


@pytest.mark.parametrize("config", [DEEP, replace(DEEP, attention=(False, True, False)), TINY.unet])
def test_what_reads_no_context_is_computed_once_for_all_contexts(config):
    unet = UNet(config)
    latents, timesteps, first = inputs(np.array([981, 957.375], np.float32), 5, 7)
    contexts = np.concatenate([first, 2 * first, 3 * first])
    found = unet([latents, timesteps, contexts])
    tiled = unet([np.tile(latents, (3, 1, 1, 1)), np.tile(timesteps, 3), contexts])
    np.testing.assert_allclose(found, tiled, rtol=0, atol=1e-5)
    assert abs(ops.convert_to_numpy(found[:2] - found[2:4])).max() > 1e-4

    names = [layer.name for layer in unet.layers]
    reader = next(i for i, name in enumerate(names) if name.endswith("attn2.to_k"))
    read = names[reader].removesuffix("attn2.to_k")
    outputs = [unet.get_layer(read + end).output for end in ("attn1.to_out.0", "attn2.to_out.0")]
    before, after = keras.Model(unet.inputs, outputs)([latents, timesteps, contexts])
    assert (before.shape[0], after.shape[0]) == (2, 6)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("config", [DEEP, replace(TINY.unet, widths=(32,)), TINY.unet])
def test_the_shallow_rest_of_the_same_inputs_says_the_same(config, dtype):
    unet = UNet(config, dtype)
    keeping, reusing = unet.keeping(), unet.reusing()
    given = [ops.convert_to_tensor(x) for x in inputs(np.array([981, 957.375], np.float32), 5, 7)]
    expected = unet(given)
    found, deep = keeping(given)
    assert deep.shape == (2, 5, 7, 32)
    without = reusing([*given, 0 * deep])
    errors = [
        abs(ops.convert_to_numpy(ops.cast(prediction - expected, "float32"))).max()
        for prediction in (found, reusing([*given, deep]), without)
    ]
    assert max(errors[:2]) <= 1e-5 < 1e-3 < errors[2]


def test_the_shallow_rest_has_no_weights_of_its_own(deep):
    blocks = ("conv_in", "time_embedding", "up_blocks.2.resnets.1", "up_blocks.2.attentions.1")
    blocks += ("conv_norm_out", "conv_out")
    expected = [v for v in deep.variables if v.path.startswith(blocks)]
    assert {id(v) for v in deep.reusing().variables} == {id(v) for v in expected}
    assert {id(v) for v in deep.keeping().variables} == {id(v) for v in deep.variables}
    assert deep.get_layer("conv_out").output is deep.outputs[0]
