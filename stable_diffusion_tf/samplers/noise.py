from collections.abc import Sequence

import numpy as np


class Noise:
    """Unit normal noise for a batch: a function of each image's own seed and the draw, no state.

    The counter-based Philox generator (Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3") is keyed by both, so an image gets the same noise whatever batch it is in and
    whatever was drawn before.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]):
        """Makes the noise of `len(seeds)` images of `shape` (h, w, c).

        Raises:
            ValueError: a seed is not a whole number from 0 to 2**64 - 1.
        """
        for seed in seeds:
            if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
                raise ValueError(f"a seed must be a whole number from 0 to 2**64 - 1, not {seed!r}")
        self._seeds = tuple(seeds)
        self._shape = shape

    def start(self) -> np.ndarray:
        """Returns the noise that images start from: (B, h, w, c) float32."""
        return self._draw(0)

    def __call__(self, i: int) -> np.ndarray:
        """Returns the noise that step i adds: (B, h, w, c) float32."""
        return self._draw(i + 1)

    def posterior(self) -> np.ndarray:
        """Returns the noise that samples an autoencoder's posterior: (B, h, w, c) float32."""
        return self._draw(2**64 - 1)

    def _draw(self, index: int) -> np.ndarray:
        draws = [
            np.random.Generator(
                np.random.Philox(key=np.array([seed, index], np.uint64))
            ).standard_normal(self._shape, np.float32)
            for seed in self._seeds
        ]
        return np.stack(draws)
