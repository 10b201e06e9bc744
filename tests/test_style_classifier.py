"""scripts/style_classifier.py on styles that a few steps tell apart."""

import numpy as np
import pytest
from style_classifier import LEVELS, StyleClassifier, blurred, palettes


def shades(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise in two styles, dark and light, in turns: uint8 (count, 16, 16, 3) and their names."""
    noise = np.random.default_rng(seed).integers(0, 100, (count, 16, 16, 3), dtype=np.uint8)
    light = np.arange(count) % 2 == 1
    return noise + 155 * light[:, None, None, None].astype(np.uint8), np.where(light, "b", "a")


def trained(epochs: int) -> StyleClassifier:
    classifier = StyleClassifier(["b", "a", "b"], size=16)
    classifier.train(*shades(16, seed=0), epochs=epochs, batch_size=8)
    return classifier


def test_it_learns_to_tell_styles():
    unseen, right = shades(8, seed=1)
    assert trained(epochs=20)(unseen).tolist() == right.tolist()


@pytest.mark.full
def test_it_learns_the_same_again():
    pairs = zip(trained(epochs=3).networks, trained(epochs=3).networks, strict=True)
    for first, again in pairs:
        for a, b in zip(first.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_palettes_are_root_shares_of_colours_and_leave_white_out():
    image = np.full((1, 4, 4, 3), 255, np.uint8)
    image[0, 0, :3] = 17 * np.array([1, 2, 3])  # one of the levels
    image[0, 0, 3] = 110  # 6.47 levels: between eight of them
    (found,) = palettes(image).reshape(1, LEVELS, LEVELS, LEVELS)
    assert found[1, 2, 3] == pytest.approx(np.sqrt(3 / 4))
    assert np.square(found).sum() == pytest.approx(1)
    assert np.count_nonzero(found) == 1 + 8
    assert not palettes(np.full((1, 4, 4, 3), 255, np.uint8)).any()


def test_blur_is_the_mean_of_the_neighbourhood():
    point = np.zeros((1, 5, 5, 1), np.uint8)
    point[0, 2, 2] = 90
    expected = np.zeros((1, 5, 5, 1), np.uint8)
    expected[0, 1:4, 1:4] = 10
    np.testing.assert_array_equal(blurred(point), expected)
    np.testing.assert_array_equal(blurred(np.full((1, 4, 4, 3), 255, "u1")), 255)
