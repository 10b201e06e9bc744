from dataclasses import replace

import numpy as np
import pytest
from tiny import TINY

from stable_diffusion_tf import tasks
from stable_diffusion_tf.diffusion.schedule import Step
from stable_diffusion_tf.samplers import SAMPLERS

DDIM = SAMPLERS["ddim"].sample
INPAINTING = replace(TINY, unet=replace(TINY.unet, in_channels=9))
LEVELS = [Step(t, (1 - t) ** 0.5, t**0.5) for t in (0.8, 0.6, 0.4, 0.2, 0.0)]
ALONE = LEVELS[0]._replace(alpha=0.0, sigma=0.9)
EPS = np.random.default_rng(0).standard_normal((2, 3, 4, 4), np.float32)
PHOTO = np.full((6, 8, 3), 0.25, np.float32)  # of 3x4 latents
MASK = np.zeros((6, 8, 1), np.float32)
MASK[2:4, 4:] = 1


def prepare(config, images=(), masks=(), first=LEVELS[0], mask_feather=0.0):
    """The task, and what it encoded and drew, in order."""
    done = []

    def encode(pictures):
        done.append(np.asarray(pictures))
        return done[-1][:, ::2, ::2].mean(-1, keepdims=True).repeat(4, -1)

    def draw():
        done.append("noise")
        return EPS

    task = tasks.prepare(config, DDIM, encode, images, masks, mask_feather, first, draw)
    return task, done


class TestBegin:
    def test_from_nothing_all_levels_run_from_noise_of_the_schedules_scale(self):
        assert tasks.begin(LEVELS, 0.9, [], [], 0.5) == (LEVELS, ALONE)

    @pytest.mark.parametrize(("strength", "run"), [(1, 4), (0.99, 3), (0.5, 2), (0.01, 1)])
    def test_over_a_picture_the_last_levels_run_from_the_first_of_them(self, strength, run):
        levels, first = tasks.begin(LEVELS, 0.9, [PHOTO], [], strength)
        assert levels == LEVELS[-1 - run :]
        assert first == levels[0]

    def test_a_masked_part_starts_from_noise_alone_at_strength_1_only(self):
        assert tasks.begin(LEVELS, 0.9, [PHOTO], [MASK], 1) == (LEVELS, ALONE)
        assert tasks.begin(LEVELS, 0.9, [PHOTO], [MASK], 0.5)[1] == LEVELS[2]


class TestPrepare:
    def test_from_nothing_is_noise(self):
        task, done = prepare(TINY, first=ALONE)
        assert done == ["noise"]
        np.testing.assert_allclose(task.start, 0.9 * EPS, rtol=1e-6)
        assert task.sample is DDIM
        assert task.finish(PHOTO) is PHOTO

    def test_over_a_picture_is_its_latents_with_noise(self):
        task, (encoded, _) = prepare(TINY, [PHOTO])
        np.testing.assert_array_equal(encoded, [PHOTO])
        expected = LEVELS[0].alpha * 0.25 + LEVELS[0].sigma * EPS
        np.testing.assert_allclose(task.start, expected, rtol=1e-5)
        assert task.sample is DDIM

    def test_only_under_the_mask_are_latents_and_pixels_new(self):
        task, _ = prepare(TINY, [PHOTO], [MASK], first=ALONE)
        *_, (x, _) = task.sample(lambda x, step: 0 * x + 0.7, task.start, LEVELS, None)
        repainted = np.zeros((2, 3, 4, 4), bool)
        repainted[:, 1, 2:] = True
        np.testing.assert_allclose(x, np.where(repainted, 0.7, 0.25), rtol=1e-5)
        pictures = task.finish(np.ones((2, 6, 8, 3), np.float32))
        np.testing.assert_array_equal(pictures, [np.where(MASK, 1, PHOTO)] * 2)

    def test_a_feather_fades_in_within_the_mask(self):
        task, _ = prepare(TINY, [PHOTO], [MASK], mask_feather=2.0)
        pictures = task.finish(np.ones((1, 6, 8, 3), np.float32))
        np.testing.assert_array_equal(pictures[0] > PHOTO, (MASK > 0) & (pictures[0] > PHOTO))
        assert (pictures[0] < np.where(MASK, 1, PHOTO)).any()

    def test_an_inpainting_network_sees_the_mask_and_the_picture_with_grey_under_it(self):
        task, (photo, drawn, grey) = prepare(INPAINTING, [PHOTO], [MASK])
        np.testing.assert_array_equal(photo, [PHOTO])
        assert drawn == "noise"  # between the two, as in diffusers
        np.testing.assert_array_equal(grey, [np.where(MASK, 0.5, PHOTO)])
        mask, masked = task.channels
        np.testing.assert_array_equal(mask, [MASK[::2, ::2]] * 2)
        np.testing.assert_array_equal(masked[..., :1], [grey[0, ::2, ::2, :1]] * 2)
        assert task.sample is DDIM

    def test_an_inpainting_network_that_starts_from_noise_has_no_use_for_the_original(self):
        task, (drawn, grey) = prepare(INPAINTING, [PHOTO], [MASK], first=ALONE)
        assert drawn == "noise" and grey.shape == (1, 6, 8, 3)
        np.testing.assert_allclose(task.start, 0.9 * EPS, rtol=1e-6)


class TestChecks:
    def check(self, config=TINY, images=(), masks=(), posterior=False, feather=0.0):
        tasks.check(config, images, masks, posterior, feather)

    def test_every_task_passes(self):
        self.check()
        self.check(images=[PHOTO], posterior=True)
        self.check(images=[PHOTO], masks=[MASK], feather=2.0)
        self.check(INPAINTING, [PHOTO], [MASK])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"posterior": True}, "the posterior of input_image; give that"),
            ({"masks": [MASK]}, "where to repaint input_image; give that"),
            ({"images": [PHOTO], "feather": 2.0}, "the edge of input_mask; give that"),
            ({"config": INPAINTING, "images": [PHOTO]}, "tiny is an inpainting model: give"),
        ],
    )
    def test_what_would_do_nothing_is_refused(self, given, message):
        with pytest.raises(ValueError, match=message):
            self.check(**given)

    def test_a_mask_repaints_a_latent_at_least(self):
        between = np.zeros_like(MASK)
        between[1::2] = between[:, 1::2] = 1  # all but the pixels that latents go by
        tasks.check_masks([], 2, 0)
        tasks.check_masks([MASK, MASK], 2, 2)
        with pytest.raises(ValueError, match=r"^input_mask repaints nothing: .* first of each 2x2"):
            tasks.check_masks([between], 2, 0)
        with pytest.raises(ValueError, match=r"^input_mask\[1\] repaints nothing"):
            tasks.check_masks([MASK, 0 * MASK], 2, 0)
        with pytest.raises(ValueError, match=r"^mask_feather 8 leaves nothing of input_mask"):
            tasks.check_masks([MASK], 2, 8.0)
