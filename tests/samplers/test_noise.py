import numpy as np
import pytest

from stable_diffusion_tf.samplers import Noise, picture_seeds


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


def test_an_unknown_generator_is_refused():
    with pytest.raises(ValueError, match="unknown rng 'cuda'; known: numpy, torch"):
        Noise([0], (2, 2, 4), rng="cuda")


def test_each_picture_has_a_seed():
    assert picture_seeds(7, 3) == [7, 8, 9]
    assert picture_seeds(2**64 - 3, 3)[-1] == 2**64 - 1
    assert picture_seeds([5, 2**64 - 1, 5], 3) == [5, 2**64 - 1, 5]
    seeds = picture_seeds(np.arange(2), 2)
    assert seeds == [0, 1] and type(seeds[0]) is int


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_is_drawn_and_logged(seed, caplog):
    with caplog.at_level("INFO"):
        first, second = (picture_seeds(seed, 2) for _ in range(2))
    assert first != second
    assert first[1] == first[0] + 1
    assert caplog.messages == [f"seed {first[0]}", f"seed {second[0]}"]


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-2, r"seed must be a whole number from 0 to 2\*\*64 - 2, not -2"),
        (2**64 - 1, "seed must be a whole number"),
        (True, "not True"),
        ("1", "not '1'"),
        (1.5, "not 1.5"),
        ([1, 2, 3], "seed: 3 seeds for 2 pictures"),
        ([1, -1], r"seed\[1\] must be a whole number from 0 to 2\*\*64 - 1, not -1"),
    ],
)
def test_a_seed_that_is_none_is_refused(seed, message):
    with pytest.raises(ValueError, match=message):
        picture_seeds(seed, 2)
