from itertools import pairwise

import numpy as np
import pytest

from stable_diffusion_tf.config import ScheduleConfig
from stable_diffusion_tf.diffusion.denoiser import add_noise
from stable_diffusion_tf.diffusion.inpainting import CLEAN, repainting
from stable_diffusion_tf.diffusion.schedule import steps
from stable_diffusion_tf.samplers import SAMPLERS, Noise

SHAPE = (2, 6, 8, 4)
NOISE = Noise(seeds=range(2), shape=SHAPE[1:])
EPS = NOISE.start().astype(np.float64)
ORIGINAL = np.random.default_rng(0).standard_normal(SHAPE)
MASK = np.zeros((2, 6, 8, 1))
MASK[0, :3] = MASK[1, :, 2:5] = 1


def denoise(x, step):
    """What is found at a latent depends on the others too, as a network's answer does."""
    return 0.5 * x + 0.3 * np.roll(x, 1, axis=2) + 0.2 * x.mean((1, 2), keepdims=True)


def run(sample, start, levels):
    return [x for x, _ in sample(denoise, start, levels, NOISE)]


@pytest.mark.parametrize("from_noise", [True, False])
def test_blending_around_the_sampler_is_blending_after_each_step(from_noise):
    levels = steps(ScheduleConfig(), 6)
    ddim = SAMPLERS["ddim"].sample
    start = EPS if from_noise else add_noise(ORIGINAL, EPS, levels[0])
    found = run(repainting(ddim, ORIGINAL, MASK, EPS), start, levels)

    x, expected = start, []
    for now, after in pairwise(levels):
        ((x, _),) = ddim(denoise, x, [now, after], NOISE)
        kept = ORIGINAL if after is levels[-1] else add_noise(ORIGINAL, EPS, after)
        x = np.where(MASK, x, kept)
        expected.append(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_kept_is_the_original_at_every_level(name):
    row = SAMPLERS[name]
    levels = steps(ScheduleConfig(), 6, **row.grid)
    seen = []

    def watched(x, step):
        seen.append((x, step))
        return denoise(x, step)

    def known(step):
        return EPS if step == levels[0] else add_noise(ORIGINAL, EPS, step)

    repaint = repainting(row.sample, ORIGINAL, MASK, EPS)
    found = [*repaint(watched, EPS, levels, NOISE)]
    for x, step in seen:
        np.testing.assert_array_equal(np.where(MASK, 0, x), np.where(MASK, 0, known(step)))
    for clean in (found[-1][0], *(x0 for _, x0 in found)):
        np.testing.assert_array_equal(np.where(MASK, 0, clean), np.where(MASK, 0, ORIGINAL))
        assert np.isfinite(clean).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mask_of_everything_leaves_the_sampler_as_it_is(name):
    row = SAMPLERS[name]
    levels = steps(ScheduleConfig(), 6, **row.grid)
    everything = repainting(row.sample, ORIGINAL, np.ones_like(MASK), EPS)
    np.testing.assert_array_equal(run(everything, EPS, levels), run(row.sample, EPS, levels))


def test_one_mask_and_picture_serve_a_batch():
    levels = steps(ScheduleConfig(), 3)
    ddim = SAMPLERS["ddim"].sample
    batch = run(repainting(ddim, ORIGINAL[:1], MASK[:1], EPS), EPS, levels)
    both = repainting(ddim, ORIGINAL[[0, 0]], MASK[[0, 0]], EPS)
    np.testing.assert_array_equal(batch, run(both, EPS, levels))


def test_the_end_has_no_noise():
    np.testing.assert_array_equal(add_noise(ORIGINAL, EPS, CLEAN), ORIGINAL)
