"""What sets drawing from text, over a picture, and into its masked part apart."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from stable_diffusion_tf.config import ModelConfig
from stable_diffusion_tf.diffusion.denoiser import add_noise
from stable_diffusion_tf.diffusion.inpainting import repainting
from stable_diffusion_tf.diffusion.schedule import Step
from stable_diffusion_tf.images import feather


class Task(NamedTuple):
    """How a task begins, samples and ends."""

    start: Any  # the latents to begin with, (B, h, w, 4)
    sample: Callable  # a sampler, its options bound
    channels: tuple = ()  # what the network sees beside the latents, (B, h, w, …)
    finish: Callable = lambda pictures: pictures  # the last touch


def check(
    config: ModelConfig,
    images: Sequence[Any],
    masks: Sequence[Any],
    sample_posterior: bool,
    mask_feather: float,
) -> None:
    """Raises ValueError if they are no task, or none of this model's, or one would do nothing."""
    if sample_posterior and not images:
        raise ValueError("sample_posterior is of the posterior of input_image; give that too")
    if masks and not images:
        raise ValueError("input_mask says where to repaint input_image; give that too")
    if mask_feather and not masks:
        raise ValueError("mask_feather softens the edge of input_mask; give that too")
    if config.unet.inpaints and not masks:
        raise ValueError(
            f"{config.name} is an inpainting model: give input_image and input_mask (all "
            "white to repaint the whole picture), or take a model for text to image"
        )


def check_masks(masks: Sequence[np.ndarray], factor: int, mask_feather: float) -> None:
    """Raises ValueError if one of the masks (H, W, 1), feathered, repaints no latent or pixel."""
    for i, mask in enumerate(masks):
        name = f"input_mask[{i}]" if len(masks) > 1 else "input_mask"
        if not _latents(_white(mask), factor).any():
            raise ValueError(
                f"{name} repaints nothing: of the pixels that latents go by, the first of each "
                f"{factor}x{factor} square at the model's size, none is white; whiten a larger part"
            )
        if not feather(_white(mask).astype(np.float32), mask_feather).any():
            raise ValueError(
                f"mask_feather {mask_feather:g} leaves nothing of {name}, which is no wider at the "
                "model's size; take less"
            )


def begin(
    levels: Sequence[Step],
    scale: float,
    images: Sequence[Any],
    masks: Sequence[Any],
    strength: float,
) -> tuple[Sequence[Step], Step]:
    """Returns those of the noise levels that are stepped through, and the one to start from.

    Args:
        levels: the sampler's, noisiest first.
        scale: of the noise to start from where there is no image in it.
        images, masks: as of `prepare`.
        strength: over 0, up to 1: the share of steps that run over images. At 1 a masked part
            starts from noise alone, an image as a whole does not.
    """
    alone = levels[0]._replace(alpha=0.0, sigma=scale)
    if not images:
        return levels, alone
    run = levels[-1 - max(1, int((len(levels) - 1) * strength)) :]
    return run, alone if masks and strength == 1 else run[0]


def prepare(
    config: ModelConfig,
    sample: Callable,
    encode: Callable[[np.ndarray], np.ndarray],
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    mask_feather: float,
    first: Step,
    draw: Callable[[], np.ndarray],
) -> Task:
    """Returns the task: from nothing; over pictures (H, W, 3); or where masks (H, W, 1) are white.

    What it encodes and draws is in diffusers' order, as PyTorch's random numbers hang on that: the
    pictures, unless nothing of them is needed; the noise; the pictures with grey under the masks.

    Args:
        config: the model's.
        sample: the sampler.
        encode: pictures in [0, 1] -> scaled latents (B, h, w, 4).
        images, masks: none, one, or one a picture.
        mask_feather: pixels.
        first: the level of the images and of their noise to start from.
        draw: gives that noise, unit normal (B, h, w, 4).
    """
    needless = not images or (config.unet.inpaints and first.alpha == 0)
    originals = 0.0 if needless else encode(np.stack(images))
    eps = draw()
    start = ops.convert_to_tensor(add_noise(originals, eps, first), "float32")
    if not masks:
        return Task(start, sample)

    pixels = np.stack(images)
    repainted = _white(np.stack(masks)).astype(np.float32)
    weights = np.stack([feather(mask, mask_feather) for mask in repainted])

    def finish(pictures):
        return weights * pictures + (1 - weights) * pixels

    mask = _latents(repainted, config.autoencoder.factor)
    if config.unet.inpaints:
        grey = encode(np.where(repainted, np.float32(0.5), pixels))
        channels = (np.repeat(part, len(eps) // len(part), axis=0) for part in (mask, grey))
        return Task(start, sample, tuple(channels), finish)
    repaint = repainting(sample, *map(ops.convert_to_tensor, (originals, mask, eps)))
    return Task(start, repaint, finish=finish)


def _white(masks: np.ndarray) -> np.ndarray:
    return masks >= 0.5


def _latents(masks: np.ndarray, factor: int) -> np.ndarray:
    """Masks (…, H, W, 1) -> (…, h, w, 1): each latent goes by the first pixel of its square."""
    return masks[..., ::factor, ::factor, :]
