"""Classifier-free guidance."""

from collections.abc import Callable
from numbers import Real

from keras import ops


def guided(
    network: Callable,
    context,
    negative_context=None,
    guidance=1.0,
    rescale=None,
) -> Callable:
    """Returns `predict(latents, timesteps)`, the network's prediction drawn towards its context.

    Ho and Salimans 2022, arXiv:2207.12598, in the form `negative + guidance * (positive -
    negative)`: what the context adds, exaggerated. Both predictions come from one call: of the
    latents once, and of two contexts for each, all negative ones first.

    Args:
        network: `network(latents (B, h, w, c), timesteps (B,), context (n B, N, width))`,
            returning its raw predictions (n B, h, w, c): of all latents with the first B contexts,
            then of all of them with the next.
        context: (B, N, width).
        negative_context: what to be drawn away from, shaped as `context`; None: no guidance.
        guidance: a number, of which 1 or less runs the network without guidance; or a scalar
            tensor, whose value a compiled function cannot look at: it always guides.
        rescale: in [0, 1], how far the guided prediction gets back the positive one's standard
            deviation, image by image (Lin et al. 2023, arXiv:2305.08891, section 3.4): a number or
            a scalar tensor. None, like 0, changes nothing.
    """
    if negative_context is None or (isinstance(guidance, Real) and guidance <= 1):
        return lambda latents, timesteps: network(latents, timesteps, context)
    contexts = ops.concatenate([negative_context, context])

    def predict(latents, timesteps):
        negative, positive = ops.split(network(latents, timesteps, contexts), 2)
        mixed = negative + guidance * (positive - negative)
        if rescale is not None:
            ratio = _deviation(positive) / _deviation(mixed)
            mixed = mixed * (rescale * ratio + (1 - rescale))
        return mixed

    return predict


def _deviation(images):
    return ops.std(images, axis=(1, 2, 3), keepdims=True)
