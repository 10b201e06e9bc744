import numpy as np
import pytest

from stable_diffusion_tf.samplers import Noise


def test_an_images_noise_is_its_seeds_whatever_the_batch():
    batch = Noise([3, 4, 5], (8, 12, 4))
    alone = Noise([4], (8, 12, 4))
    assert (batch.start()[1] == alone.start()[0]).all()
    assert (batch(7)[1] == alone(7)[0]).all()


def test_draws_do_not_depend_on_what_was_drawn_before():
    used, fresh = Noise([0], (4, 4, 4)), Noise([0], (4, 4, 4))
    used.start(), used(0), used(5)
    assert (used(1) == fresh(1)).all()


def test_draws_and_seeds_are_independent_unit_normal():
    noise = Noise([0, 1], (64, 64, 4))
    draws = [noise.start(), noise(0), noise(1), noise.posterior()]
    draws = np.concatenate(draws).reshape(8, -1)
    assert draws.dtype == np.float32
    np.testing.assert_allclose(np.cov(draws), np.eye(8), atol=0.04)


def test_the_same_noise_on_every_machine():
    # Computed once; a change would change every user's picture of a seed.
    start = Noise([42], (1, 1, 3)).start().ravel()
    np.testing.assert_allclose(start, [0.18170474, -1.2426393, -0.551553], rtol=1e-6)


def test_largest_seed():
    assert Noise([2**64 - 1], (2, 2, 4)).start().shape == (1, 2, 2, 4)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"not {seed!r}"):
        Noise([0, seed], (2, 2, 4))
