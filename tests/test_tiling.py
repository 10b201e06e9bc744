from itertools import pairwise

import numpy as np
import pytest

from stable_diffusion_tf.tiling import spans, tiled

SIZES = [(1, 1), (31, 32), (32, 40), (33, 31), (64, 57), (100, 41), (129, 5)]


def values(height, width):
    return np.random.default_rng(0).standard_normal((height, width, 3)).astype(np.float32)


def blurred(x):
    """The mean of each value's neighbours, zeros around the picture: local, as a convolution is."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))
    return windows.mean((-2, -1), dtype=np.float64).astype(np.float32)


def enlarged(x, factor):
    return x.repeat(factor, 0).repeat(factor, 1)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("side", [8, 9, 13, 32, 128])
@pytest.mark.parametrize("gives", [1, 3, 8])
def test_spans_cover_everything_with_weights_that_sum_to_one(length, side, gives):
    total = np.zeros(length * gives)
    found = list(spans(length, side, gives))
    for start, end, weights in found:
        assert 0 <= start < end <= length
        assert end - start == min(side, length)
        assert weights.shape == ((end - start) * gives,)
        assert 0 <= weights.min() <= weights.max() <= 1
        total[start * gives : end * gives] += weights
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)
    for (_, end, _), (start, _, _) in pairwise(found):
        assert end - start >= side // 4


def test_neighbours_change_over_along_a_line_between_their_edges():
    (start, end, falling), (second, _, rising) = spans(56, 32)
    assert (start, second, end) == (0, 24, 32)
    line = (np.arange(6) + 0.5) / 6
    np.testing.assert_allclose(rising[:8], [0, *line, 1], atol=1e-6)
    np.testing.assert_allclose(falling[24:], 1 - rising[:8], atol=1e-6)
    assert (falling[:24] == 1).all() and (rising[8:] == 1).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", [lambda x: x, np.tanh, blurred])
def test_what_is_local_is_as_of_the_whole(size, function):
    x = values(*size)
    np.testing.assert_allclose(tiled(function, x, 32), function(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_cells_are_of_any_size(size):
    x = values(*size)

    def grow(x):
        return enlarged(blurred(x), 4)

    def shrink(x):
        return blurred(x[::4, ::4])

    np.testing.assert_allclose(tiled(grow, x, 32, gives=4), grow(x), rtol=0, atol=1e-6)
    x = enlarged(x, 4)
    np.testing.assert_allclose(tiled(shrink, x, 32, reads=4), shrink(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "seen"),
    [((32, 32), 1), ((5, 32), 1), ((33, 32), 2), ((56, 57), 6), ((80, 80), 9)],
)
def test_tiles_are_of_one_size_and_no_more_than_it_takes(size, seen):
    shapes = []

    def function(x):
        shapes.append(x.shape)
        return x

    tiled(function, values(*size), 32)
    assert shapes == [(min(size[0], 32), min(size[1], 32), 3)] * seen


def test_what_is_no_larger_than_a_tile_is_untouched():
    x = values(32, 9)
    np.testing.assert_array_equal(tiled(lambda x: x / 3, x, 32), x / 3)


def test_a_difference_between_tiles_is_a_slope_and_no_step():
    """Of a function that looks at the whole, such as a norm: tiles differ by a constant."""
    x = np.linspace(0, 1, 200)[:, None, None] * np.ones((1, 8, 1))
    shifted = tiled(lambda tile: tile - tile.mean(), x, 32) - x
    steps = abs(np.diff(shifted[:, 0, 0]))
    difference = abs(shifted[0] - shifted[-1]).max() / 8  # between one tile and the next
    assert steps.max() < difference / 3
