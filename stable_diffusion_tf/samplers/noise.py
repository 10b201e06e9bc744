import logging
import secrets
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral
from typing import Any

import numpy as np

from stable_diffusion_tf.samplers.torch_generator import TorchGenerator

log = logging.getLogger(__name__)


class Noise:
    """Unit normal noise for a batch: a function of each image's own seed and the draw.

    So an image gets the same noise whatever batch it is in and, but for PyTorch's, whatever was
    drawn before.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], rng: str = "numpy"):
        """Makes the noise of `len(seeds)` images of `shape` (h, w, c).

        Args:
            rng: whose numbers: "numpy", or "torch" for those that PyTorch users know.

        Raises:
            ValueError: a seed is not a whole number from 0 to 2**64 - 1, or `rng` is unknown.
        """
        if rng not in STREAMS:
            raise ValueError(f"unknown rng {rng!r}; known: {', '.join(STREAMS)}")
        self._streams = [STREAMS[rng](_checked("a seed", seed), shape) for seed in seeds]

    def start(self) -> np.ndarray:
        """Returns the noise that images start from: (B, h, w, c) float32."""
        return self._draw(0)

    def __call__(self, i: int) -> np.ndarray:
        """Returns the noise that step i adds: (B, h, w, c) float32."""
        return self._draw(i + 1)

    def posterior(self, i: int = 0) -> np.ndarray:
        """Returns the noise that samples the i-th posterior of an autoencoder: like `start`'s."""
        return self._draw(2**64 - 1 - i)

    def _draw(self, index: int) -> np.ndarray:
        return np.stack([stream(index) for stream in self._streams])


def numpy_stream(seed: int, shape: tuple[int, int, int]) -> Callable[[int], np.ndarray]:
    """The draws of one image, by their number.

    From the counter-based Philox generator (Salmon et al. 2011, "Parallel random numbers: as easy
    as 1, 2, 3"), keyed by the seed and the number.
    """

    def draw(index):
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
        return generator.standard_normal(shape, np.float32)

    return draw


def torch_stream(seed: int, shape: tuple[int, int, int]) -> Callable[[int], np.ndarray]:
    """The draws of one image, by their number, as `torch.randn((1, c, h, w))` makes them.

    One generator makes one after the other, so what is asked for first is drawn first, as it would
    be with PyTorch; what was drawn is kept, to be had again.
    """
    height, width, channels = shape
    generator = TorchGenerator(seed)

    @cache
    def draw(index):
        return generator.randn(channels, height, width).transpose(1, 2, 0)

    return draw


STREAMS = {"numpy": numpy_stream, "torch": torch_stream}


def picture_seeds(seed: Any, count: int) -> list[int]:
    """The seeds of `count` pictures.

    Args:
        seed: the first one's, and each other has the next; None or -1: it is drawn, and logged. Or
            a list, one a picture.

    Raises:
        ValueError: one of the seeds is not a whole number from 0 to 2**64 - 1, or the list is not
            of `count`.
    """
    if isinstance(seed, np.ndarray):
        seed = seed.tolist()
    if isinstance(seed, list | tuple | range):
        if len(seed) != count:
            raise ValueError(f"seed: {len(seed)} seeds for {count} pictures; give one a picture")
        return [_checked(f"seed[{i}]", one) for i, one in enumerate(seed)]
    if seed in (None, -1):
        seed = secrets.randbits(32)
        log.info("seed %d", seed)
    first = _checked("seed", seed, count)
    return list(range(first, first + count))


def _checked(name: str, seed: Any, count: int = 1) -> int:
    """Checks the first of `count` seeds."""
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not (whole and 0 <= seed <= 2**64 - count):
        raise ValueError(f"{name} must be a whole number from 0 to 2**64 - {count}, not {seed!r}")
    return int(seed)
