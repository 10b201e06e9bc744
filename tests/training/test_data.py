"""Batches are a pure function of the seed and the step."""

import numpy as np
import pytest

from stable_diffusion_tf.config import ScheduleConfig
from stable_diffusion_tf.diffusion.schedule import alphas_cumprod
from stable_diffusion_tf.training.data import noisy_batches, random, shuffled

SCHEDULE = ScheduleConfig()


def batches(count=6, batch_size=4, caption_drop=0.1, **options):
    mean = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 4), "f")
    return noisy_batches(
        mean,
        np.zeros_like(mean),
        caption=lambda i, rng: f"caption {i}",
        tokenize=list,
        schedule=SCHEDULE,
        batch_size=batch_size,
        caption_drop=caption_drop,
        **{"seed": 0, **options},
    )


def test_every_pass_shows_every_item_once_in_an_order_of_its_own():
    passes = [
        np.concatenate([shuffled(12, 4, seed=0, step=3 * epoch + i) for i in range(3)])
        for epoch in range(2)
    ]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(12))
    assert list(passes[0]) != list(passes[1])


def test_fewer_items_than_a_batch_is_an_error():
    with pytest.raises(ValueError, match=r"3 items.*batch of 4"):
        shuffled(3, 4, seed=0, step=0)


def test_the_same_step_gives_the_same_batch_and_another_does_not():
    again, first, later, other = batches()(5), batches()(5), batches()(6), batches(seed=1)(5)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[1], later[1])
    assert not np.array_equal(first[1], other[1])


def test_no_two_keys_share_a_stream():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    assert len({random(0, *key).integers(2**63) for key in keys}) == len(keys)


def test_captions_belong_to_their_latents():
    latents, *_, captions = batches(caption_drop=0.0)(0)
    assert [f"caption {int(i)}" for i in latents[:, 0, 0, 0]] == captions


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_asked_share_of_captions_is_empty(share):
    batch = batches(caption_drop=share)
    captions = [caption for step in range(500) for caption in batch(step)[-1]]
    assert np.mean([not caption for caption in captions]) == pytest.approx(share, abs=0.03)


def test_noise_levels_are_the_schedules_and_spread_evenly():
    *_, timesteps, alpha, sigma, _ = batches(count=64, batch_size=64)(0)
    np.testing.assert_allclose(
        alpha[:, 0, 0, 0] ** 2, alphas_cumprod(SCHEDULE)[timesteps.astype(int)], 1e-6
    )
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, 1e-6)
    assert sorted(timesteps * 64 // 1000) == list(range(64))  # one in each 64th of the schedule


@pytest.mark.parametrize("shift, share", [(1.0, 0.5), (3.0, 0.75)])
def test_a_shift_draws_noisier_timesteps(shift, share):
    _, _, timesteps, *_ = batches(count=64, batch_size=64, shift=shift)(0)
    assert np.mean(timesteps >= 500) == pytest.approx(share, abs=1 / 64)
    assert timesteps.min() >= 0 and timesteps.max() <= 999
