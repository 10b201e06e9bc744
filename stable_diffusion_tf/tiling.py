"""A function of a large picture, computed on overlapping tiles that are blended into each other.

It takes the memory of one tile, whatever the picture's size, and is compiled for one shape. Each
value of the result that depends only on what is near it is what the function of the whole gives.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

SMALLEST = 8  # cells along a tile's side


def tiled(
    function: Callable[[np.ndarray], np.ndarray],
    values: np.ndarray,
    side: int,
    *,
    reads: int = 1,
    gives: int = 1,
) -> np.ndarray:
    """Returns `function(values)`, tile by tile; in one piece what is no larger than a tile.

    Args:
        function: (h * reads, w * reads, C) -> (h * gives, w * gives, D), for any number of cells
            (h, w).
        values: (h * reads, w * reads, C).
        side: of a tile, in cells, `SMALLEST` or more. Tiles share a quarter of it or more.
        reads, gives: what a cell is of the input and of the result, in values along each side.
    """
    height, width = (length // reads for length in values.shape[:2])
    result: np.ndarray | None = None
    for top, bottom, rows in spans(height, side, gives):
        for left, right, columns in spans(width, side, gives):
            tile = function(values[top * reads : bottom * reads, left * reads : right * reads])
            if result is None:
                result = np.zeros((height * gives, width * gives, tile.shape[-1]), tile.dtype)
            result[top * gives : bottom * gives, left * gives : right * gives] += (
                rows[:, None, None] * columns[:, None] * tile
            )
    return result


def spans(length: int, side: int, gives: int = 1) -> Iterator[tuple[int, int, np.ndarray]]:
    """Covers `length` cells by spans of `side`, or by one; yields their starts, ends and weights.

    The weights, ((end - start) * gives,) float32, sum to 1 over the spans. From one span to the
    next they change along a ramp, three quarters as long as what the two share. Near an end, where
    the function misses the picture beyond it, they are 0.
    """
    side = min(side, length)
    count = 1 - (side - length) // (side - side // 4)
    starts = np.linspace(0, length - side, count).round().astype(int)
    shared = side - np.diff(starts).max(initial=0)
    changes = [-np.inf, *(starts[1:] + starts[:-1] + side) / 2, np.inf]
    for start, (before, after) in zip(starts, pairwise(changes), strict=True):
        at = start + (np.arange(side * gives) + 0.5) / gives
        weights = _risen(at, before, shared * 3 / 4) - _risen(at, after, shared * 3 / 4)
        yield int(start), int(start + side), weights.astype(np.float32)


def _risen(at: np.ndarray, middle: float, width: float) -> np.ndarray:
    """From 0 to 1 along a ramp around `middle`."""
    return np.clip((at - middle) / width + 0.5, 0, 1)
