"""The parts that are written for speed compute what the plain ones do, and their gradients."""

import math
from functools import partial

import keras
import numpy as np
import pytest
from compare import close
from keras import layers as plain
from keras import ops

from stable_diffusion_tf.compile import compiler
from stable_diffusion_tf.models import layers
from stable_diffusion_tf.models.layers import (
    Convolution,
    DotProductAttention,
    GatedGELU,
    GroupNormalization,
    LayerNormalization,
    NearestUpsampling,
    gelu,
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def twins(ours, theirs, shape):
    """Two layers with the same weights, none of them 0 or 1."""
    for layer in (ours, theirs):
        layer.build(shape)
    for variable, peer in zip(ours.variables, theirs.variables, strict=True):
        variable.assign(normal(*variable.shape))
        peer.assign(variable)
    return ours, theirs


def gradients(layer, x):
    """By the input, then by the weights: of a sum in which every output has another weight."""

    def total(x):
        out = layer(x)
        return ops.sum(out * ops.cos(ops.reshape(ops.arange(ops.size(out)), ops.shape(out))))

    if keras.backend.backend() == "jax":
        import jax

        def loss(x, values):
            pairs = list(zip(layer.variables, values, strict=True))
            with keras.StatelessScope(state_mapping=pairs):
                return total(x)

        by_input, by_weights = jax.grad(loss, (0, 1))(
            ops.convert_to_tensor(x), [v.value for v in layer.variables]
        )
        return [by_input, *by_weights]
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = total(x)
    return tape.gradient(loss, [x, *(v.value for v in layer.variables)])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "strides", "size"),
    [
        (3, 1, (2, 3)),
        (3, 1, (1, 1)),
        (1, 1, (4, 2)),
        (1, 1, (5, 7)),
        (3, 1, (8, 8)),
        (5, 1, (9, 6)),
        (3, 2, (9, 7)),
        (3, 2, (8, 12)),
        (3, 2, (3, 3)),
        (1, 2, (5, 8)),
    ],
)
def test_convolution(kernel, strides, size, batch):
    shape = (batch, *size, 6)
    padding = "same" if strides == 1 else "valid"
    ours, theirs = twins(
        *(layer(16, kernel, strides, padding=padding) for layer in (Convolution, plain.Conv2D)),
        shape,
    )
    x = normal(*shape)
    close(ours(x), theirs(x))
    for found, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        close(found, expected, 1e-5)


def test_few_positions_are_one_product(monkeypatch):
    layer = Convolution(16, 3, padding="same")
    layer.build((None, None, None, 6))
    monkeypatch.setattr(layer, "convolution_op", None)
    layer(normal(2, 2, 4, 6))
    with pytest.raises(TypeError, match="not callable"):
        layer(normal(2, 2, 5, 6))


@pytest.mark.parametrize(
    ("dtype", "batch", "size", "strides", "convolved"),
    [
        ("float32", 1, (4, 5), 1, [(2, 4, 7, 6)]),
        ("float32", 1, (7, 5), 1, [(2, 6, 7, 6)]),
        ("float32", 1, (9, 9), 2, [(2, 5, 9, 6)]),
        ("float32", 2, (4, 5), 1, []),
        ("bfloat16", 1, (4, 5), 1, []),
    ],
)
@pytest.mark.parametrize("onednn", [True, False])
def test_onednn_is_given_one_picture_as_two(
    monkeypatch, onednn, dtype, batch, size, strides, convolved
):
    shapes = []

    def conv(x, *args, of=ops.conv):
        shapes.append(tuple(x.shape))
        return of(x, *args)

    monkeypatch.setattr(layers, "uses_onednn", lambda: onednn)
    monkeypatch.setattr(ops, "conv", conv)
    padding = "same" if strides == 1 else "valid"
    ours, theirs = twins(
        *(kind(4, 3, strides, padding, dtype=dtype) for kind in (Convolution, plain.Conv2D)),
        (batch, *size, 6),
    )
    x = normal(batch, *size, 6)
    close(ops.cast(ours(x), "float32"), ops.cast(theirs(x), "float32"))
    assert shapes == (convolved if onednn else [])


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "strides": 2},
        {"padding": "valid"},
        {"padding": "same", "dilation_rate": 2},
        {"padding": "same", "groups": 2},
    ],
)
def test_what_no_fast_form_is_for_is_refused(options):
    with pytest.raises(ValueError, match="is a Conv2D"):
        Convolution(4, 3, **options)


NORMS = {
    "group": (
        partial(GroupNormalization, 4, epsilon=1e-6),
        partial(plain.GroupNormalization, 4, epsilon=1e-6),
    ),
    "layer": (
        partial(LayerNormalization, epsilon=1e-5),
        partial(plain.LayerNormalization, epsilon=1e-5),
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize("norm", NORMS)
def test_normalization(norm, dtype, offset):
    shape = (2, 5, 3, 12)
    make, make_plain = NORMS[norm]
    ours, theirs = twins(make(dtype=dtype), make_plain(dtype="float32"), shape)
    x = ops.cast(normal(*shape) + offset, ours.compute_dtype)
    found = ours(x)
    assert keras.backend.standardize_dtype(found.dtype) == ours.compute_dtype
    rounding = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}[ours.compute_dtype]
    close(ops.cast(found, "float32"), theirs(ops.cast(x, "float32")), rounding)


@pytest.mark.parametrize("norm", NORMS)
def test_normalization_is_differentiated(norm):
    shape = (2, 5, 3, 12)
    ours, theirs = twins(*(make() for make in NORMS[norm]), shape)
    x = normal(*shape)
    for found, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        close(found, expected, 1e-5)


def test_twice_the_size():
    x = normal(2, 3, 5, 4)
    ours, theirs = NearestUpsampling(), plain.UpSampling2D(2)
    close(ours(x), theirs(x), 0)
    (found,), (expected,) = gradients(ours, x), gradients(theirs, x)
    close(found, expected)


def test_gelu():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    close(gelu(x), ops.gelu(x, approximate=False), 1e-6)


def test_gated_gelu():
    layer = GatedGELU(10, bias_initializer="normal")
    x = RNG.standard_normal((2, 3, 8), dtype="f")
    layer.build(x.shape)
    h, gate = np.split(x @ np.asarray(layer.kernel) + np.asarray(layer.bias), 2, -1)
    assert layer.compute_output_shape(x.shape) == (2, 3, 5)
    close(layer(x), h * gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2, 1e-6)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
@pytest.mark.parametrize("block", [16 * 16, 16 * 16 // 4, 40, 1])
def test_attention_in_blocks_is_exact(monkeypatch, size, block):
    q, k, v = normal(3, 2, *size, 8)
    layer = DotProductAttention(heads=2)
    whole = layer(q, k, v)
    monkeypatch.setattr(layers, "BLOCK", block)
    monkeypatch.setattr(ops, "dot_product_attention", None)
    close(layer(q, k, v), whole)
    in_a_graph = compiler()(lambda *args: layer(*args))
    close(in_a_graph(*map(ops.convert_to_tensor, (q, k, v))), whole)


@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize("block", [40, 1])
def test_attention_in_blocks_rounds_bfloat16_as_it_does_in_one_piece(monkeypatch, block, scale):
    q, k, v = (ops.cast(scale**0.5 * x, "bfloat16") for x in normal(3, 2, 4, 5, 8))
    layer = DotProductAttention(heads=2, dtype="bfloat16")
    whole = ops.cast(layer(q, k, v), "float32")
    monkeypatch.setattr(layers, "BLOCK", block)
    assert layer(q, k, v).dtype == q.dtype
    np.testing.assert_allclose(ops.cast(layer(q, k, v), "float32"), whole, rtol=0, atol=2**-6)
