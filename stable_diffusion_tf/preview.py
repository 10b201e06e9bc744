"""Small, cheap pictures of latents, to look at while they are being denoised."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

SIDE = 32  # of the latents that a decoder is judged by
PATCHES = (2, 4, 8, 16)  # sides of the patches of one value that they are made of


class Preview:
    """Pictures, uint8 (B, h, w, 3), that are computed when they are first looked at.

    Index it, or hand it to NumPy, as the array that it stands for: `preview[0]`, `preview.shape`,
    `np.asarray(preview)`.
    """

    def __init__(self, compute: Callable[[], np.ndarray]):
        self._pictures = cache(compute)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._pictures(), dtype)

    def __getitem__(self, key: Any) -> Any:
        return self._pictures()[key]

    def __len__(self) -> int:
        return len(self._pictures())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._pictures(), name)


def linear_decoder(
    decode: Callable[[np.ndarray], np.ndarray], channels: int, factor: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the linear map nearest to a decoder: latents (B, h, w, c) -> (B, h, w, 3) in [0, 1].

    The colours of a picture are nearly linear in its latents. The map is fitted, by least squares,
    to what the decoder makes of random patches: unit normal, as the latents are that it was
    trained on, and of many sizes, as what is in pictures.

    Args:
        decode: latents (B, h, w, c) -> pictures (B, h * factor, w * factor, 3) in [0, 1].
    """
    rng = np.random.default_rng(0)

    def patches(side):
        values = rng.standard_normal((SIDE // side, SIDE // side, channels), np.float32)
        return values.repeat(side, 0).repeat(side, 1)

    latents = np.stack([patches(side) for side in PATCHES])
    colours = decode(latents).reshape(-1, SIDE, factor, SIDE, factor, 3).mean((2, 4))
    samples, wanted = _with_one(latents).reshape(-1, channels + 1), colours.reshape(-1, 3)
    fitted, *_ = np.linalg.lstsq(samples, wanted, rcond=None)
    return lambda latents: np.clip(_with_one(latents) @ fitted, 0, 1)


def _with_one(latents: np.ndarray) -> np.ndarray:
    return np.concatenate([latents, np.ones_like(latents[..., :1])], -1)
