"""Engines, which run what the Keras backend has traced, and how TensorFlow traces and is set up."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import keras
import ml_dtypes
import numpy as np
import pytest
import synth
import tensorflow as tf
from keras import ops
from tensorflow.python.eager import context  # no public name tells what a graph became
from tiny import TINY, write_folder

from stable_diffusion_tf import StableDiffusion
from stable_diffusion_tf import compile as compile_module
from stable_diffusion_tf.checkpoints.load import load
from stable_diffusion_tf.compile import (
    compiler,
    fused,
    memory_errors,
    onednn,
    openvino,
    plain,
    tensorflow,
    traced_once,
    uses_onednn,
)
from stable_diffusion_tf.models.layers import (
    DotProductAttention,
    GatedGELU,
    GroupNormalization,
    LayerNormalization,
)

SIZE = {"img_height": 14, "img_width": 10}  # of odd latents
RNG = np.random.default_rng(0)
PHOTO = RNG.random((14, 10, 3), dtype=np.float32)
MASK = np.zeros((14, 10), bool)
MASK[3:9, 2:7] = True


@pytest.fixture(scope="module")
def engines(tiny_model):
    """The same model on TensorFlow and on OpenVINO, in float32."""
    return [
        StableDiffusion.from_pretrained(tiny_model, **SIZE, engine=engine)
        for engine in (None, "openvino")
    ]


def drawn(sd, prompt="a red apple", **settings):
    settings = {"num_steps": 3, "seed": 0, "output": "float", "progress": False, **settings}
    return sd.generate(prompt, "blue", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"unconditional_guidance_scale": 1},
        {"guidance_rescale": 0.7, "sampler": "euler", "batch_size": 2},
        {"prompt": "cat " * 80, "clip_skip": 2, "sampler": "dpmpp_2m"},
        {"reuse": 2},
        {"input_image": PHOTO},
        {"input_image": PHOTO, "input_mask": MASK, "input_image_strength": 1},
    ],
    ids=["guided", "unguided", "batch", "chunks", "reuse", "image", "mask"],
)
def test_an_engine_draws_the_backends_pictures(engines, settings):
    expected, found = (drawn(sd, **settings) for sd in engines)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_the_inpainting_networks_mask_passes_through_an_engine(tmp_path, tiny_weights):
    config = replace(TINY, unet=replace(TINY.unet, in_channels=9))
    first = {"conv_in.weight": synth.weight("conv_in.weight", (32, 9, 3, 3))}
    weights = {**tiny_weights, "unet": tiny_weights["unet"] | first}
    folder = write_folder(tmp_path / "inpainting", config, weights)
    settings = {"input_image": PHOTO, "input_mask": MASK, "input_image_strength": 1}
    expected, found = (
        drawn(StableDiffusion.from_pretrained(folder, **SIZE, engine=engine), **settings)
        for engine in (None, "openvino")
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float16"])
def test_an_engine_computes_in_the_dtype(engines, tiny_model, dtype):
    sd = StableDiffusion.from_pretrained(tiny_model, **SIZE, dtype=dtype, engine="openvino")
    difference = drawn(sd) - drawn(engines[0])
    signal_to_noise = -10 * np.log10((difference**2).mean())
    assert 25 < signal_to_noise < (60 if "bfloat16" in dtype else 100)
    found, expected = (drawn(one, reuse=3, output="latents") for one in (sd, engines[0]))
    assert synth.relative_error(found, expected) < 0.05


def test_timesteps_stay_exact_in_bfloat16(tiny_model):
    """bfloat16 has no 981, only 980 and 984."""
    unet = load(tiny_model, "mixed_bfloat16").unet
    run = compiler("openvino")(lambda *inputs: unet(inputs), unet.variables)
    latents, context = (RNG.standard_normal(s, dtype="f") for s in ((1, 8, 8, 4), (1, 77, 32)))

    def predicted(step):
        return np.asarray(run(latents, np.array([step], np.float32), context), np.float32)

    assert abs(predicted(981) - predicted(980)).max() > 0


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"]
)
def test_norms_and_attention_become_the_engines_own_operations(tiny_model, dtype):
    models = load(tiny_model, dtype)
    latents, timesteps, context = (np.zeros(s, "f") for s in ((1, 8, 8, 4), (1,), (1, 77, 32)))
    for model, *inputs in (
        (models.unet, latents, timesteps, context),
        (models.decoder, latents),
    ):
        call = (lambda *x: models.unet(x)) if model is models.unet else model
        traced = openvino._traced(call, model.variables, inputs)
        converted, *_ = openvino._converted(traced, model.variables, [x.shape for x in inputs])
        nodes = [(node.get_type_name(), node.get_attributes()) for node in converted.get_ops()]
        found = [
            (attributes["num_groups"], pytest.approx(attributes["epsilon"]))
            for kind, attributes in nodes
            if kind == "GroupNormalization"
        ]
        norms = [layer for layer in model.layers if isinstance(layer, GroupNormalization)]
        assert sorted(found, key=str) == sorted([(n.groups, n.epsilon) for n in norms], key=str)
        attentions = sum(isinstance(layer, DotProductAttention) for layer in model.layers)
        assert sum(kind == "ScaledDotProductAttention" for kind, _ in nodes) == attentions > 0


def test_an_instance_norm_is_not_taken_for_a_group_norm():
    """It is written like one, but for its means."""
    gamma, beta = RNG.standard_normal((2, 2, 3), dtype="f")

    def function(x):
        rows = ops.reshape(x, (ops.shape(x)[0], -1, 2, 3))
        mean, variance = ops.moments(rows, axes=[1], keepdims=True)
        scale = gamma * ops.rsqrt(variance + 1e-5)
        return ops.reshape(rows * scale + (beta - mean * scale), ops.shape(x))

    x = RNG.standard_normal((1, 4, 4, 6), dtype="f")
    np.testing.assert_allclose(compiler("openvino")(function)(x), function(x), atol=1e-5)


def test_an_engine_compiles_once_a_shape_and_takes_the_weights_then():
    dense = keras.layers.Dense(3)
    dense.build((None, 2))
    calls = []

    def function(x):
        calls.append(x.shape)
        return dense(x)

    run = compiler("openvino")(function, dense.variables)
    x = RNG.standard_normal((4, 2), dtype="f")
    expected = np.asarray(dense(x))
    dense.kernel.assign(np.asarray(dense.kernel))
    for _ in range(2):
        np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-6)
        dense.kernel.assign(np.zeros((2, 3)))
    assert len(calls) == 1
    np.testing.assert_array_equal(run(x[:1]), [[0, 0, 0]])


def test_structures_and_none_pass_through_an_engine():
    def function(x, pair, nothing):
        assert nothing is None
        return x + 1, {"both": pair[0] * pair[1]}

    one, other = compiler("openvino")(function)(
        np.float32(1), (np.ones(2, "f"), np.ones(2, "f")), None
    )
    assert np.asarray(one) == 2
    np.testing.assert_array_equal(other["both"], [1, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "onnx"}, "unknown engine 'onnx'; known: openvino; or none"),
        ({"engine": "openvino", "jit_compile": True}, "does without XLA; leave jit_compile out"),
    ],
)
def test_engines_that_cannot_be_had_are_refused_on_opening(tiny_model, settings, message):
    with pytest.raises(ValueError, match=message):
        StableDiffusion.from_pretrained(tiny_model, **settings)


def test_an_engine_needs_tensorflow(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="'openvino' runs what TensorFlow has traced; set KERAS_"):
        compiler("openvino")


def test_an_engine_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setattr(compile_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="run `pip install openvino`"):
        compiler("openvino")


@pytest.mark.parametrize(
    "given", [{}, {"TF_CPU_ALLOCATOR_USE_BFC": "0"}, {"TF_ENABLE_ONEDNN_OPTS": "0"}]
)
def test_tensorflow_keeps_memory_and_uses_onednn_unless_told_otherwise(given):
    says = {
        "TF_CPU_ALLOCATOR_USE_BFC": "BFCAllocator named: bfc_cpu",
        "TF_ENABLE_ONEDNN_OPTS": "oneDNN custom operations are on",
    }
    unset = {key: value for key, value in os.environ.items() if key not in says}
    logged = {"TF_CPP_VMODULE": "bfc_allocator=1", "TF_CPP_MIN_LOG_LEVEL": "0"}
    code = """
import os, stable_diffusion_tf, tensorflow as tf
from stable_diffusion_tf.compile import uses_onednn
tf.zeros(3)
print(os.environ["TF_CPU_ALLOCATOR_USE_BFC"], os.environ["TF_ENABLE_ONEDNN_OPTS"], uses_onednn())
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=unset | logged | given, capture_output=True, text=True
    )
    assert run.returncode == 0
    for variable, said in says.items():
        assert (said in run.stderr) == (variable not in given)
    onednn = "TF_ENABLE_ONEDNN_OPTS" not in given
    assert run.stdout.split() == [*(given.get(key, "1") for key in says), str(onednn)]


@pytest.mark.parametrize("onednn", ["0", "1"])
@pytest.mark.parametrize("jit", [False, True])
def test_softmax_is_float32s_rounded_once(onednn, jit):
    code = f"""
import numpy as np, stable_diffusion_tf, keras
from stable_diffusion_tf.compile import compiler, softmax, traced_once
rooted = traced_once(lambda x: softmax(x))
x = 4 * np.random.default_rng(0).standard_normal((3, 999), dtype=np.float32)
for dtype in ("float32", "bfloat16", "float16"):
    low = keras.ops.cast(x, dtype)
    expected = keras.ops.cast(keras.ops.softmax(keras.ops.cast(low, "float32")), dtype)
    for jit in ({not jit}, {jit}):  # a trace for one is none for the other
        found = compiler(jit=jit)(rooted)(low)
    np.testing.assert_allclose(*(keras.ops.cast(y, "float32") for y in (found, expected)), 1e-6)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": onednn},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


with_onednn = pytest.mark.skipif(not uses_onednn(), reason="TensorFlow has no oneDNN here")


@pytest.mark.parametrize("summed", [2**17, 9, 1])  # of 60, in 1, 10 and 60 parts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_onednn_finds_the_moments_and_gradients_of_any_backend(dtype, summed, monkeypatch):
    monkeypatch.setattr(onednn, "SUMMED", summed)
    x = ops.cast(3 + RNG.standard_normal((2, 60, 4, 8), dtype="f"), dtype)
    scale, shift = (ops.cast(RNG.standard_normal((2, 1, 4, 8)), "float32") for _ in range(2))

    def normalized(by):
        with tf.GradientTape() as tape:
            tape.watch([x, scale, shift])
            mean, variance = by.moments(x)
            y = by.affine(x, scale * variance, shift - mean)
            value = ops.sum(ops.sin(ops.cast(y, "float32")))
        return [mean, variance, y, *tape.gradient(value, [x, scale, shift])]

    expected = normalized(plain)
    for found in (normalized(onednn), compiler()(lambda: normalized(onednn))()):
        for i, (value, other) in enumerate(zip(found, expected, strict=True)):
            assert value.dtype == other.dtype
            eps = float(ml_dtypes.finfo(dtype if i > 1 else "float32").eps)
            value, other = (np.asarray(ops.cast(v, "float32")) for v in (value, other))
            np.testing.assert_allclose(value, other, rtol=0, atol=16 * eps * np.abs(other).max())


@with_onednn
@pytest.mark.parametrize(
    "shape, dtype, jit, count",
    [
        ((1, 4, 4, 8), "float32", False, 2),
        ((2, 4, 4, 8), "bfloat16", False, 4),
        ((3, 4, 4, 8), "bfloat16", False, 0),
        ((1, 4, 4, 8), "float16", False, 0),
        ((1, 4, 4, 8), "float64", False, 0),
        ((1, 4, 4, 8), "float32", True, 0),
        ((2, 4, 4, 8), "float32", False, 0),
        ((1, None, 4, 8), "float32", False, 0),
    ],
)
def test_onednn_normalizes_a_picture_or_two_of_known_size(shape, dtype, jit, count):
    norm = GroupNormalization(2, dtype=dtype)
    norm.build(shape)
    function = tf.function(lambda x: norm(x), jit_compile=jit, autograph=False)
    graph = function.get_concrete_function(tf.TensorSpec(shape, dtype)).graph.as_graph_def()
    nodes = [*graph.node, *(node for called in graph.library.function for node in called.node_def)]
    assert [node.op for node in nodes].count("FusedBatchNormV3") == count


@with_onednn
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_onednn_standardizes_and_is_differentiated_as_any_backend(dtype, monkeypatch):
    norm = LayerNormalization(epsilon=1e-5, dtype=dtype)
    norm.build((2, 5, 12))
    for weight in norm.weights:
        weight.assign(RNG.standard_normal(12))
    x = ops.cast(3 + RNG.standard_normal((2, 5, 12), dtype="f"), norm.compute_dtype)

    def standardized():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = norm(x)
            value = ops.sum(ops.sin(ops.cast(y, "float32")))
        return [y, *tape.gradient(value, [x, norm.gamma.value, norm.beta.value])]

    expected = standardized()
    monkeypatch.setattr(onednn, "WORTH", 0)
    for value, other in zip(compiler()(standardized)(), expected, strict=True):
        assert value.dtype == other.dtype
        eps = float(ml_dtypes.finfo(norm.compute_dtype).eps)
        value, other = (np.asarray(ops.cast(v, "float32")) for v in (value, other))
        np.testing.assert_allclose(
            value,
            other,
            rtol=0,
            atol=(16 if norm.compute_dtype == "float32" else 2) * eps * np.abs(other).max(),
        )


@with_onednn
@pytest.mark.parametrize(
    "shape, jit, has, count",
    [
        ((1, 64, 2048), False, True, 1),
        ((64, 2048), False, True, 1),
        ((1, 64, 2048), False, False, 0),
        ((1, 64, 2047), False, True, 0),
        ((1, 64, 2048), True, True, 0),
        ((None, 64, 2048), False, True, 0),
    ],
)
def test_onednn_standardizes_what_is_large_and_of_known_size(shape, jit, has, count, monkeypatch):
    monkeypatch.setattr(onednn, "has_layer_norm", lambda: has)
    norm = LayerNormalization()
    norm.build(shape)
    function = compiler(jit=jit)(lambda x: norm(x))
    graph = function.get_concrete_function(tf.TensorSpec(shape)).graph.as_graph_def()
    assert [node.op for node in graph.node].count("_MklLayerNorm") == count


def test_what_a_user_traces_can_be_called_within_xla():
    norm = LayerNormalization()
    norm.build((1, 64, 2048))
    traced = tf.function(lambda x: norm(x), autograph=False)
    x = RNG.standard_normal((1, 64, 2048), dtype="f")
    expected = traced(x)  # so it is a trace that was not made for XLA
    found = tf.function(lambda x: traced(x), jit_compile=True, autograph=False)(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@with_onednn
def test_what_is_traced_once_is_called_and_fused_with_what_follows():
    norm = GroupNormalization(2)
    norm.build((1, 4, 4, 8))
    function = tf.function(lambda x: ops.silu(norm(x)), autograph=False)
    x = tf.zeros((1, 4, 4, 8))
    function.get_concrete_function(x)
    context.enable_run_metadata()
    function(x)
    run = context.export_run_metadata().function_graphs
    context.disable_run_metadata()
    found = [[node.op for node in graph.post_optimization_graph.node] for graph in run]
    assert any({"StatefulPartitionedCall", "PartitionedCall"} & {*graph} for graph in found)
    assert any("_MklSwish" in graph for graph in found)


@pytest.fixture
def rooted():
    """A function that is traced once, and the shapes that it was traced for."""
    shapes = []

    def function(x, y, power):
        shapes.append(tuple(x.shape))
        return x**power + y

    return traced_once(function), shapes


def test_many_shapes_are_no_reason_to_warn(caplog):
    variable = keras.Variable(1.0)
    drawing = compiler()(lambda x: ops.sum(x))
    training = compile_module.training_step(
        lambda x: ops.sum(x) * variable, [variable], keras.optimizers.SGD(0.0)
    )
    tf.get_logger().addHandler(caplog.handler)  # which no other logger is told by
    try:
        for size in range(1, 9):
            x = np.ones(size, np.float32)
            assert float(drawing(x)) == float(training(x)) == size
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert caplog.messages == []


def test_a_gradient_s_upstream_may_be_of_unknown_rank():
    squared = compile_module.differentiated_as(lambda x: x * x)(lambda x: ops.power(x, 2))

    @tf.function(input_signature=[tf.TensorSpec((2,)), tf.TensorSpec(None)], autograph=False)
    def slope(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = squared(x)
        return tape.gradient(y, x, upstream)

    np.testing.assert_array_equal(slope(tf.constant([1.0, 2.0]), tf.constant([3.0, 5.0])), [6, 20])


def test_calls_of_equal_shapes_share_one_trace(rooted):
    function, shapes = rooted

    def several(x, y):
        large = ops.concatenate([x, x], axis=0)
        return function(x, y, 2) + function(y, x, 2) + function(x, y, 3), function(large, y[:1], 2)

    x, y = (ops.convert_to_tensor(RNG.standard_normal((2, 3), dtype="f")) for _ in range(2))
    found = compiler()(several)(x, y)
    assert shapes == [(2, 3), (2, 3), (4, 3)]  # of powers 2 and 3, and of the large one
    for value, expected in zip(found, several(x, y), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert len(shapes) == 7  # what is not compiled, is not traced


@pytest.mark.parametrize(("onednn", "size"), [(True, 8), (True, 7), (False, 8)])
def test_xla_fuses_what_is_large_on_a_cpu(monkeypatch, onednn, size):
    monkeypatch.setattr(tensorflow, "uses_onednn", lambda: onednn)
    monkeypatch.setattr(tensorflow, "LARGE", 8)
    traced = []

    @fused
    def squared(x):
        traced.append(tensorflow._in_xla())
        return x * x

    @compiler()
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = squared(x) + squared(x)
        return y, tape.gradient(y, x)

    x = ops.arange(size, dtype="float32")
    operations = {op.type for op in gradient.get_concrete_function(x).graph.get_operations()}
    assert "Mul" not in operations  # all are called, the gradient's once it is due
    for found, expected in zip(gradient(x), (2 * x * x, 4 * x), strict=True):
        np.testing.assert_array_equal(found, expected)
    large = onednn and size == 8
    assert traced == [large] * (1 + large)  # a large one's gradient computes it again


def test_a_trace_for_unknown_sizes_serves_no_known_ones(rooted):
    function, shapes = rooted
    for rows in (None, 2):
        spec = tf.TensorSpec((rows, 3))
        tf.function(lambda x: function(x, x, 2)).get_concrete_function(spec)
    assert shapes == [(None, 3), (2, 3)]


def test_a_backend_is_asked_for_when_what_is_traced_once_is_called(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    function = traced_once(lambda x: x)
    with pytest.raises(ValueError, match="'torch' is not supported"):
        function(1)


def test_gradients_of_what_is_traced_once(rooted):
    function, _ = rooted

    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x, 3 * x, 2) + function(3 * x, x, 2)
        return tape.gradient(value, x)

    x = ops.convert_to_tensor(RNG.standard_normal((2, 3), dtype="f"))
    np.testing.assert_allclose(compiler()(slope)(x), 20 * x + 4, rtol=1e-5)


def test_blocks_of_one_size_share_the_traces_of_norms_and_attention(tiny_model):
    unet = load(tiny_model).unet
    specs = [tf.TensorSpec(s) for s in ((1, 8, 8, 4), (1,), (1, 77, 32))]
    graph = tf.function(lambda *x: unet(x)).get_concrete_function(*specs).graph
    calls = [op.get_attr("f").name for op in graph.get_operations() if "Partitioned" in op.type]
    calls = [name for name in calls if "as_product" not in name]
    kinds = (DotProductAttention, GatedGELU, GroupNormalization, LayerNormalization)
    assert len(calls) == sum(isinstance(layer, kinds) for layer in unet.layers)
    assert len(set(calls)) < len(calls) / 2


@pytest.mark.parametrize(
    ("name", "full", "other"),
    [
        (
            "tensorflow",
            tf.errors.ResourceExhaustedError(None, None, "OOM when allocating"),
            tf.errors.InternalError(None, None, "OOM"),
        ),
        (
            "jax",
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"),
            jax.errors.JaxRuntimeError("INTERNAL: Out of luck"),
        ),
    ],
)
def test_a_backend_s_lack_of_memory_is_a_memory_error(monkeypatch, name, full, other):
    monkeypatch.setattr(keras.backend, "backend", lambda: name)
    with pytest.raises(MemoryError, match="take less"), memory_errors("take less"):
        raise full
    with pytest.raises(type(other)), memory_errors("take less"):
        raise other
