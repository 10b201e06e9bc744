"""How near two results must come to each other."""

import numpy as np
from keras import ops


def close(found, expected, tolerance=2e-6):
    """Asserts equal shapes and values, off by `tolerance` of the largest at most."""
    found, expected = ops.convert_to_numpy(found), ops.convert_to_numpy(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
