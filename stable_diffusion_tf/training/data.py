"""What a training step sees, as a pure function of the run's seed and the step's number.

So a run that goes on from a save needs no state of a generator or of a data reader.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from stable_diffusion_tf.config import ScheduleConfig, TextEncoderConfig
from stable_diffusion_tf.diffusion.schedule import alphas_cumprod
from stable_diffusion_tf.images import (
    SUFFIXES,
    ImageSource,
    load_image,
    resize,
    uint8_to_unit,
    unit_to_signed,
    unit_to_uint8,
)
from stable_diffusion_tf.tokenizer import Tokenizer


def random(seed: int, *counters: int) -> np.random.Generator:
    """A generator keyed by the run's seed and counters such as the step: same key, same draws."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=counters)))


ORDER, NOISE = range(2)  # what is drawn: the first counter, so that no two share a stream


def shuffled(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the batch of `step`: passes over `count` items, each in an order of its own.

    Raises:
        ValueError: there are fewer items than a batch takes.
    """
    if count < batch_size:
        raise ValueError(
            f"{count} items do not fill a batch of {batch_size}; take a smaller batch or more items"
        )
    epoch, batch = divmod(step, count // batch_size)
    order = random(seed, ORDER, epoch).permutation(count)
    return order[batch * batch_size :][:batch_size]


def noisy_batches(
    mean: np.ndarray,
    deviation: np.ndarray,
    caption: Callable[[int, np.random.Generator], str],
    tokenize: Callable[[Sequence[str]], np.ndarray],
    schedule: ScheduleConfig,
    *,
    batch_size: int,
    seed: int,
    caption_drop: float = 0.1,
    shift: float = 1.0,
):
    """Returns `batch(step)`, the arguments of `diffusion_loss`.

    Args:
        mean, deviation: of the pictures' latents, scaled, (count, h, w, channels); each use draws
            from that Gaussian, the autoencoder's posterior.
        caption: `caption(i, rng)` -> a caption of picture i.
        tokenize: captions -> token ids (B, N).
        caption_drop: share of empty captions, for classifier-free guidance (arXiv:2207.12598).
        shift: above 1 it draws noisier timesteps more often, where the text decides most
            (Esser et al. 2024, arXiv:2403.03206, eq. 23); 1 draws all alike.
    """
    squares = alphas_cumprod(schedule)
    unit = (batch_size, *mean.shape[1:])

    def batch(step):
        rng = random(seed, NOISE, step)
        picked = shuffled(len(mean), batch_size, seed, step)
        latents = mean[picked] + deviation[picked] * rng.standard_normal(unit, np.float32)
        noise = rng.standard_normal(unit, np.float32)
        # Evenly over all timesteps in every batch: less variance than independent draws
        # (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
        even = (rng.random() + np.arange(batch_size) / batch_size) % 1
        shifted = shift * even / (1 + (shift - 1) * even)
        timesteps = (shifted * len(squares)).astype(int)
        square = squares[timesteps].reshape(-1, 1, 1, 1)
        alpha, sigma = np.sqrt(square), np.sqrt(1 - square)
        captions = ["" if rng.random() < caption_drop else caption(i, rng) for i in picked]
        return (
            latents,
            noise,
            timesteps.astype(np.float32),
            alpha.astype(np.float32),
            sigma.astype(np.float32),
            tokenize(captions),
        )

    return batch


def tokenizer(config: TextEncoderConfig) -> Callable[..., np.ndarray]:
    """Returns `tokenize(texts)`, as of `Tokenizer.tokenize`, for a text encoder of `config`."""
    pad = config.pad_token
    return partial(Tokenizer().tokenize, max_length=config.max_length, pad_token=pad)


def captions(folder: str | os.PathLike) -> dict[Path, str]:
    """A folder's pictures and their captions, by name: of `fox.jpg`, what `fox.txt` says.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: it has no pictures; or one without a caption, or a caption without a picture.
    """
    files = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        raise ValueError(
            f"{folder} has no pictures: none of its files ends in {' '.join(SUFFIXES)}"
        )
    found = {path: _text(path.with_suffix(".txt")) for path in pictures}
    lone = [path for path in pictures if not found[path]]
    if lone:
        raise ValueError(
            f"{_listed(lone)}: no caption. Write it into a .txt of the picture's name, such as "
            f"{lone[0].with_suffix('.txt').name}"
        )
    known = {path.with_suffix(".txt") for path in pictures}
    lone = [path for path in files if path.suffix == ".txt" and path not in known]
    if lone:
        raise ValueError(
            f"{_listed(lone)}: a caption without a picture of its name. Name it as the picture, "
            "or move it away"
        )
    return found


def square(source: ImageSource, size: int) -> np.ndarray:
    """The middle of a picture, as large a square as it has, scaled: uint8 (size, size, 3).

    Errors as of `load_image`.
    """
    image = load_image(source)
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return unit_to_uint8(resize(image[top : top + side, left : left + side], size, size))


def signed(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1], which the autoencoder's encoder takes."""
    return unit_to_signed(uint8_to_unit(images))


def posterior(encoder, images, scale: float = 1.0, batch_size: int = 64):
    """Mean and standard deviation of the latents of uint8 pictures (N, H, W, 3), times `scale`."""
    moments = encoder.predict(signed(images), batch_size, verbose=0)
    mean, log_variance = np.split(moments, 2, axis=-1)
    return scale * mean, scale * np.exp(0.5 * log_variance)


def _text(path: Path) -> str:
    """What a file says; "" if there is none."""
    try:
        return path.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid text: {error}; write it in UTF-8") from None


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join([str(path) for path in paths[:3]] + ["…"] * (len(paths) > 3))
