import keras
import numpy as np
import pytest
from keras import ops

from stable_diffusion_tf.config import ScheduleConfig
from stable_diffusion_tf.diffusion.denoiser import add_noise, denoiser, predicted_x0, target
from stable_diffusion_tf.diffusion.schedule import Step, steps

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 4, 6, 4), dtype=np.float32)
CONTEXT = RANDOM.standard_normal((2, 77, 8), dtype=np.float32)
NEGATIVE = RANDOM.standard_normal((2, 77, 8), dtype=np.float32)
STEP = steps(ScheduleConfig(), 10)[3]


class Network:
    """A prediction that depends on all three inputs; remembers the shapes that it was given."""

    def __init__(self):
        self.batches = []
        self.timesteps = None

    def __call__(self, latents, timesteps, context):
        self.batches.append((latents.shape[0], context.shape[0]))
        self.timesteps = timesteps
        times = context.shape[0] // latents.shape[0]
        latents = ops.tile(latents, (times, 1, 1, 1))
        timesteps = ops.reshape(ops.tile(timesteps, times), (-1, 1, 1, 1))
        pull = ops.mean(context, axis=(1, 2))[:, None, None, None]
        return ops.sin(latents * (1 + pull)) + timesteps / 1000


def compiled(function):
    if keras.backend.backend() == "jax":
        return pytest.importorskip("jax").jit(function)
    return pytest.importorskip("tensorflow").function(function)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_network_that_hits_its_target_finds_x0(prediction):
    x0, noise = X, X[::-1]
    x = add_noise(x0, noise, STEP)

    def perfect(latents, timesteps, context):
        return target(x0, noise, STEP, prediction)

    found = denoiser(perfect, prediction, CONTEXT)(x, STEP)
    np.testing.assert_allclose(found, x0, rtol=0, atol=1e-5)


def test_v_finds_x0_where_there_is_no_signal():
    step = Step(999.0, 0.0, 1.0)
    v = target(X, X[::-1], step, "v")
    np.testing.assert_array_equal(predicted_x0(X[::-1], v, step, "v"), X)


def test_training_and_sampling_share_the_formulas():
    """Steps of arrays, one noise level an image, are many steps of numbers at once."""
    levels = steps(ScheduleConfig(), 2)[:2]
    batch = Step(*(np.float32(column).reshape(-1, 1, 1, 1) for column in zip(*levels, strict=True)))
    for function in (add_noise, lambda *args: target(*args, "v")):
        together = function(X, X[::-1], batch)
        for i, level in enumerate(levels):
            alone = function(X[i], X[::-1][i], level)
            np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


def test_the_network_is_told_the_steps_own_fractional_timestep():
    network = Network()
    denoiser(network, "epsilon", CONTEXT)(X, Step(957.375, 0.1, 0.9))
    assert keras.backend.standardize_dtype(network.timesteps.dtype) == "float32"
    np.testing.assert_array_equal(network.timesteps, [957.375, 957.375])


def test_guidance_is_one_call_of_two_contexts_for_each():
    network = Network()
    denoiser(network, "epsilon", CONTEXT, NEGATIVE, guidance=7.5)(X, STEP)
    assert network.batches == [(2, 4)]


@pytest.mark.parametrize("guidance", [1, 1.0, np.float32(1), 0.0, -2])
def test_guidance_up_to_1_runs_no_unconditional_half(guidance):
    network = Network()
    x0 = denoiser(network, "epsilon", CONTEXT, NEGATIVE, guidance)(X, STEP)
    assert network.batches == [(2, 2)]
    np.testing.assert_array_equal(x0, denoiser(network, "epsilon", CONTEXT)(X, STEP))


def guided_by_hand(prediction, guidance, rescale):
    network = Network()
    timesteps = np.full(2, STEP.timestep, np.float32)
    negative = np.asarray(network(X, timesteps, NEGATIVE))
    positive = np.asarray(network(X, timesteps, CONTEXT))
    mixed = negative + guidance * (positive - negative)
    images = (1, 2, 3)
    ratio = positive.std(images, keepdims=True) / mixed.std(images, keepdims=True)
    mixed = rescale * ratio * mixed + (1 - rescale) * mixed
    return predicted_x0(X, mixed, STEP, prediction)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("rescale", [None, 0.0, 0.7, 1.0])
def test_guidance_mixes_and_rescales_the_raw_predictions(prediction, rescale):
    x0 = denoiser(Network(), prediction, CONTEXT, NEGATIVE, 7.5, rescale)(X, STEP)
    np.testing.assert_allclose(
        x0, guided_by_hand(prediction, 7.5, rescale or 0), rtol=1e-4, atol=1e-5
    )


def test_half_precision_predictions_are_mixed_in_the_type_of_x():
    def half(latents, timesteps, context):
        return ops.cast(Network()(latents, timesteps, context), "float16")

    x0 = denoiser(half, "v", CONTEXT, NEGATIVE, guidance=7.5, rescale=0.7)(X, STEP)
    assert keras.backend.standardize_dtype(x0.dtype) == "float32"
    np.testing.assert_allclose(x0, guided_by_hand("v", 7.5, 0.7), rtol=0, atol=0.02)


def test_one_compiled_function_serves_every_step_and_guidance():
    network = Network()

    @compiled
    def denoise(x, step, context, negative, guidance):
        return denoiser(network, "epsilon", context, negative, guidance)(x, step)

    for guidance in (3.0, 7.5):
        for step in steps(ScheduleConfig(), 4)[:-1]:
            tensors = Step(*(ops.convert_to_tensor(value, "float32") for value in step))
            scale = ops.convert_to_tensor(guidance, "float32")
            x, context, negative = map(ops.convert_to_tensor, (X, CONTEXT, NEGATIVE))
            x0 = denoise(x, tensors, context, negative, scale)
            eager = denoiser(Network(), "epsilon", CONTEXT, NEGATIVE, guidance)(X, step)
            np.testing.assert_allclose(x0, eager, rtol=1e-4, atol=1e-4)
    assert network.batches == [(2, 4)]  # traced once


def test_numpy_stays_numpy():
    def zeros(latents, timesteps, context):
        return np.zeros_like(latents)

    x0 = denoiser(zeros, "epsilon", None)(X.astype(np.float64), STEP)
    assert isinstance(x0, np.ndarray)
    assert x0.dtype == np.float64


def test_an_unknown_prediction_is_refused_before_the_network_runs():
    with pytest.raises(ValueError, match="unknown prediction 'x0'; known: epsilon, v"):
        denoiser(Network(), "x0", CONTEXT)
