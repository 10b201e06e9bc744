"""stable_diffusion_tf/models/winograd.py is the convolution that it is a shorter way to."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from stable_diffusion_tf.compile import compiler, training_step
from stable_diffusion_tf.models import layers, winograd
from stable_diffusion_tf.training.ema import values

RNG = np.random.default_rng(0)


def normal(*shape):
    return ops.convert_to_tensor(RNG.standard_normal(shape, dtype=np.float32))


def close(found, expected, tolerance=2e-6):
    found, expected = ops.convert_to_numpy(found), ops.convert_to_numpy(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 3)] * 3, *[st.integers(1, 5)] * 2, st.integers(1, 2**9))
def test_it_is_the_convolution_in_one_piece_and_in_blocks(batch, rows, columns, c, f, block):
    x, kernel = normal(batch, 2 * rows, 2 * columns, c), normal(3, 3, c, f)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "BLOCK", block)
        close(winograd.convolve(x, kernel), winograd.convolve_directly(x, kernel))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("block", [2**9, 2**20])
def test_its_gradient_is_the_convolutions(monkeypatch, block, jit):
    monkeypatch.setattr(winograd, "BLOCK", block)
    x, wanted = normal(2, 4, 6, 3), normal(2, 4, 6, 5)
    value = RNG.standard_normal((3, 3, 3, 5), dtype=np.float32)
    updated = []
    for convolve in (winograd.convolve, winograd.convolve_directly):
        kernel = keras.Variable(value)

        def loss(x, convolve=convolve, kernel=kernel):
            return ops.mean(ops.square(convolve(x, kernel.value) - wanted))

        step = training_step(loss, [kernel], keras.optimizers.SGD(1.0), jit)
        step(x)
        updated += values([kernel])
    close(*updated)
    assert np.abs(updated[0] - value).max() > 1e-2


@pytest.mark.parametrize(
    ("shape", "kernel", "shorter"),
    [
        ((2, 64, 64, 320), (3, 3, 320, 320), True),  # as measured on a CPU, beside the others
        ((2, 16, 16, 1280), (3, 3, 1280, 1280), True),
        ((2, 8, 8, 2560), (3, 3, 2560, 1280), False),
        ((1, 256, 256, 256), (3, 3, 256, 256), True),
        ((1, 512, 512, 256), (3, 3, 256, 128), False),
        ((2, 64, 64, 4), (3, 3, 4, 320), False),
        ((2, 64, 65, 320), (3, 3, 320, 320), False),  # not in patches of two
        ((2, 65, 64, 320), (3, 3, 320, 320), False),
        ((2, 64, 64, 320), (1, 1, 320, 320), False),
    ],
)
def test_where_it_is_the_shorter_way(shape, kernel, shorter):
    assert winograd.is_shorter(shape, kernel) is shorter


@pytest.mark.parametrize(
    ("dtype", "onednn", "used"),
    [("float32", True, 1), ("float32", False, 0), ("bfloat16", True, 0)],
)
def test_layers_go_it_in_float32_on_onednn(monkeypatch, dtype, onednn, used):
    went = []

    def convolve(x, kernel, of=winograd.convolve):
        went.append(x.shape)
        return of(x, kernel)

    monkeypatch.setattr(layers, "uses_onednn", lambda: onednn)
    monkeypatch.setattr(winograd, "FEWEST", 1)
    monkeypatch.setattr(winograd, "convolve", convolve)
    layer = layers.Convolution(4, 3, padding="same", dtype=dtype)
    layer.build((2, 4, 4, 6))
    layer.bias.assign(normal(4))
    x = normal(2, 4, 4, 6)
    found = ops.cast(compiler()(layer)(x), "float32")
    kernel, bias = (ops.cast(w, "float32") for w in (layer.kernel, layer.bias))
    expected = winograd.convolve_directly(x, kernel) + bias
    close(found, expected, 2e-6 if dtype == "float32" else 2e-2)
    assert len(went) == used


def test_layers_of_several_places_only_to_come_do_not(monkeypatch):
    monkeypatch.setattr(layers, "uses_onednn", lambda: True)
    monkeypatch.setattr(winograd, "convolve", None)
    keras.Sequential([layers.Convolution(512, 3, padding="same")])(keras.Input((None, None, 512)))
