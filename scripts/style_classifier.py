"""Two small networks that tell together which style a picture is in; drawn pictures are judged so.

One sees the picture, the other only which colours it has: the sets draw from palettes of their own.
Both learn from each picture as it is and blurred, because a style is colours, outlines and shading,
and not sharpness. All that is random is seeded.
"""

from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

from stable_diffusion_tf.training.optimizer import adamw

SEED = 0
LEVELS = 16  # of red, green and blue each, that palettes tell apart
WHITE = 248  # from here on a pixel is background


class StyleClassifier:
    """Guesses until it has learnt with `train`."""

    def __init__(self, styles: Sequence[str], size: int):
        """`styles`: their names, repeated or not; `size`: the pictures' height and width."""
        keras.utils.set_random_seed(SEED)
        self.styles = np.unique(styles)
        convolutions = []
        for filters, kernel in ((32, 5), (64, 3), (128, 3), (128, 3)):
            convolutions += [
                layers.Conv2D(filters, kernel, strides=2, padding="same", use_bias=False),
                layers.BatchNormalization(momentum=0.95),
                layers.ReLU(),
            ]
        by_sight = keras.Sequential(
            [
                layers.Input((size, size, 3)),
                layers.Rescaling(1 / 127.5, offset=-1),
                layers.RandomFlip("horizontal"),
                *convolutions,
                layers.GlobalAveragePooling2D(),
                layers.Dense(len(self.styles)),
            ]
        )
        by_palette = keras.Sequential(
            [
                layers.Input((LEVELS**3,)),
                layers.Dropout(0.2),
                layers.Dense(128, activation="relu"),
                layers.Dropout(0.3),
                layers.Dense(len(self.styles)),
            ]
        )
        self.networks = by_sight, by_palette

    def train(self, images: np.ndarray, styles: Sequence[str], epochs=7, batch_size=64):
        """Learns from pictures, uint8 (N, S, S, 3), and their N styles."""
        wanted = (np.asarray(styles)[:, None] == self.styles).astype(np.float32)
        shown, wanted = np.concatenate([images, blurred(images)]), np.tile(wanted, (2, 1))
        steps = epochs * -(-len(shown) // batch_size)
        # Some artworks would do in two styles: smooth labels ask for no certainty about them.
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
        for network, seen in zip(self.networks, (shown, palettes(shown)), strict=True):
            optimizer = adamw(4e-3, steps, ema_momentum=0.98, warmup=200)
            network.compile(optimizer, loss, metrics=["accuracy"])
            network.fit(seen, wanted, batch_size, epochs, verbose=2)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, S, S, 3) -> N names, those whose probabilities' product is the highest."""
        scores = [
            keras.ops.log_softmax(network.predict(seen, verbose=0))
            for network, seen in zip(self.networks, (images, palettes(images)), strict=True)
        ]
        return self.styles[keras.ops.convert_to_numpy(sum(scores)).argmax(axis=-1)]


def palettes(images: np.ndarray) -> np.ndarray:
    """Which colours pictures have, but white: uint8 (N, H, W, 3) -> float32 (N, LEVELS**3).

    Root shares of the pixels, each divided among the eight levels around its colour.
    """
    return np.stack([_palette(image) for image in images])


def _palette(image: np.ndarray) -> np.ndarray:
    colours = image[image.min(axis=-1) < WHITE] * ((LEVELS - 1) / 255)
    low = np.minimum(colours.astype(int), LEVELS - 2)
    total = np.zeros(LEVELS**3)
    for corner in np.ndindex(2, 2, 2):
        parts = np.where(corner, colours - low, 1 - (colours - low)).prod(axis=-1)
        bins = np.ravel_multi_index((low + corner).T, (LEVELS,) * 3)
        total += np.bincount(bins, parts, LEVELS**3)
    return np.sqrt(total / max(len(colours), 1)).astype(np.float32)


def blurred(images: np.ndarray) -> np.ndarray:
    """Means over 3 x 3 pixels, uint8 (N, H, W, C) both; what leaves at one edge enters opposite."""
    total = np.zeros(images.shape, np.uint16)
    for move in np.ndindex(3, 3):
        total += np.roll(images, np.subtract(move, 1), axis=(1, 2))
    return ((total + 4) // 9).astype(np.uint8)
