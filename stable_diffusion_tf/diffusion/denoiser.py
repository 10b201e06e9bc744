"""From a network's prediction to clean latents, and from clean latents to what it should predict.

A step is anything with `timestep`, `alpha` and `sigma`; its numbers may be scalar tensors, so that
a compiled denoiser serves every step, or arrays (B, 1, 1, 1) when training.
"""

from collections.abc import Callable

import keras
from keras import ops

from stable_diffusion_tf.diffusion.guidance import guided


def add_noise(x0, noise, step):
    """Returns x at `step`: `alpha * x0 + sigma * noise` (DDPM, arXiv:2006.11239, equation 4)."""
    return step.alpha * x0 + step.sigma * noise


def target(x0, noise, step, prediction: str):
    """Returns what a network that predicts `prediction` should say of x at `step`.

    "epsilon" is the noise; "v" is `alpha * noise - sigma * x0` (Salimans and Ho 2022,
    arXiv:2202.00512, appendix D).
    """
    if _known(prediction) == "v":
        return step.alpha * noise - step.sigma * x0
    return noise


def predicted_x0(x, output, step, prediction: str):
    """Returns the clean latents that a network's `output` stands for, the inverse of `target`."""
    if _known(prediction) == "v":
        return step.alpha * x - step.sigma * output
    return (x - step.sigma * output) / step.alpha


def denoiser(
    network: Callable,
    prediction: str,
    context,
    negative_context=None,
    guidance=1.0,
    rescale=None,
) -> Callable:
    """Returns `denoise(x, step) -> x0`, which samplers call: a pure function, fit to compile.

    Args:
        network, context, negative_context, guidance, rescale: see `guided`; its timesteps are
            float32.
        prediction: "epsilon" or "v", what the network predicts.
    """
    _known(prediction)

    def exact_network(latents, timesteps, context):
        return _like(network(latents, timesteps, context), latents)

    predict = guided(exact_network, context, negative_context, guidance, rescale)

    def denoise(x, step):
        # float32 whatever x is: half precision would round 981 to 980, integers cut 957.375 short.
        timestep = ops.cast(step.timestep, "float32")
        output = predict(x, ops.broadcast_to(timestep, (ops.shape(x)[0],)))
        return predicted_x0(x, output, step, prediction)

    return denoise


def _known(prediction: str) -> str:
    if prediction not in ("epsilon", "v"):
        raise ValueError(f"unknown prediction {prediction!r}; known: epsilon, v")
    return prediction


def _like(output, x):
    """Casts a mixed-precision network's output to the type of x; leaves it alone if it has it."""
    kind = keras.backend.standardize_dtype(x.dtype)
    same = keras.backend.standardize_dtype(output.dtype) == kind
    return output if same else ops.cast(output, kind)
