"""stable_diffusion_tf/models/winograd.py is the convolution that it is a shorter way to."""

import keras
import numpy as np
import pytest
from compare import close
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from stable_diffusion_tf.compile import training_step
from stable_diffusion_tf.models import layers, winograd
from stable_diffusion_tf.training.ema import values

RNG = np.random.default_rng(0)


def normal(*shape):
    return ops.convert_to_tensor(RNG.standard_normal(shape, dtype=np.float32))


@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 3)] * 3, *[st.integers(1, 5)] * 2, st.integers(1, 2**9))
def test_it_is_the_convolution_in_one_piece_and_in_blocks(batch, rows, columns, c, f, most):
    x, kernel = normal(batch, 2 * rows, 2 * columns, c), normal(3, 3, c, f)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "WHOLE", most)
        patch.setattr(winograd, "BLOCK", most // 2)
        close(winograd.convolve(x, kernel), winograd.convolve_directly(x, kernel))


@pytest.mark.parametrize(("whole", "blocks"), [(12 * 8 * 6 * 5, []), (12 * 8 * 6 * 5 - 1, [3])])
def test_what_is_too_much_for_one_piece_is_in_equal_blocks(monkeypatch, whole, blocks):
    mapped = []

    def of_each(function, elements, of=ops.map):
        mapped.append(len(elements))
        return of(function, elements)

    monkeypatch.setattr(ops, "map", of_each)
    monkeypatch.setattr(winograd, "WHOLE", whole)
    monkeypatch.setattr(winograd, "BLOCK", 5 * 8 * 6 * 5)  # 5 of 12 rows of patches, but equally 4
    winograd.convolve(normal(3, 8, 6, 4), normal(3, 3, 4, 5))
    assert mapped == blocks


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 8, 6, 3)], ids=["whole", "in blocks"])
def test_its_gradients_are_the_convolutions(monkeypatch, shape, jit):
    monkeypatch.setattr(winograd, "WHOLE", 4 * 8 * 6 * 5)
    monkeypatch.setattr(winograd, "BLOCK", 4 * 8 * 6 * 5)
    values_before = [RNG.standard_normal(s, dtype=np.float32) for s in (shape, (3, 3, 3, 5))]
    wanted = normal(*shape[:-1], 5)
    updated = []
    for convolve in (winograd.convolve, winograd.convolve_directly):
        variables = [keras.Variable(value) for value in values_before]

        def loss(wanted, convolve=convolve, variables=variables):
            return ops.mean(ops.square(convolve(*(v.value for v in variables)) - wanted))

        training_step(loss, variables, keras.optimizers.SGD(1.0), jit)(wanted)
        updated.append(values(variables))
    for found, expected, before in zip(*updated, values_before, strict=True):
        close(found, expected)
        assert np.abs(found - before).max() > 1e-2


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX differentiates both alike")
def test_tensorflow_differentiates_the_convolution_itself():
    import tensorflow as tf

    x, kernel = normal(1, 2, 4, 3), normal(3, 3, 3, 2)

    @tf.function(autograph=False)
    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = winograd.convolve(x, kernel)
        return tape.gradient(y, x)

    graph = slope.get_concrete_function(x).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    assert "Conv2DBackpropInput" in {node.op for node in nodes}


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
    ("dtype", "onednn", "size", "strides", "used"),
    [
        ("float32", True, 4, 1, 1),
        ("float32", False, 4, 1, 0),
        ("bfloat16", True, 4, 1, 0),
        ("float32", True, 4, 2, 0),
        ("float32", True, None, 1, 0),
    ],
)
def test_layers_take_it_in_float32_on_onednn(monkeypatch, dtype, onednn, size, strides, used):
    taken = []

    def convolve(x, kernel):
        taken.append(x.shape)
        return winograd.convolve_directly(x, kernel)

    monkeypatch.setattr(layers, "uses_onednn", lambda: onednn)
    monkeypatch.setattr(winograd, "OFTEN", 3)
    monkeypatch.setattr(winograd, "convolve", convolve)
    padding = "same" if strides == 1 else "valid"
    layer = layers.Convolution(4, 3, strides, padding, dtype=dtype)
    layer.build((None, None, None, 6))
    layer.call(keras.Input((size, size, 6), batch_size=2, dtype=dtype))
    assert len(taken) == used
