from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_diffusion_tf.config import ScheduleConfig
from stable_diffusion_tf.diffusion.schedule import alphas_cumprod, start_scale, steps

SD = ScheduleConfig()
ZERO_SNR = ScheduleConfig(prediction="v", spacing="trailing", zero_terminal_snr=True)


def test_alphas_are_the_published_ones():
    stable_diffusion = alphas_cumprod(SD)
    assert stable_diffusion.shape == (1000,)
    assert stable_diffusion.dtype == np.float64
    assert stable_diffusion[[0, -1]] == pytest.approx([0.99915, 0.0046600], rel=1e-4)
    ddpm = alphas_cumprod(ScheduleConfig(betas="linear", beta_start=1e-4, beta_end=0.02))
    assert ddpm[[0, -1]] == pytest.approx([0.9999, 4.0358e-5], rel=1e-4)


def test_zero_terminal_snr_keeps_the_first_alpha_and_ends_at_exactly_zero():
    rescaled = alphas_cumprod(ZERO_SNR)
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(alphas_cumprod(SD)[0])
    assert (np.diff(rescaled) < 0).all()


@pytest.mark.parametrize(
    ("spacing", "num_steps", "expected"),
    [
        ("leading", 4, [751, 501, 251, 1, 0]),
        ("trailing", 4, [999, 749, 499, 249, 0]),
        ("linspace", 4, [999, 666, 333, 0, 0]),
        ("trailing", 7, [999, 856, 713, 570, 428, 285, 142, 0]),
        ("linspace", 7, [999, 832, 666, 500, 333, 166, 0, 0]),
        ("linspace", 1, [999, 0]),
    ],
)
def test_integer_timesteps(spacing, num_steps, expected):
    assert [step.timestep for step in steps(SD, num_steps, spacing=spacing)] == expected


def test_fractional_timesteps_interpolate_sigma_over_alpha():
    step = steps(SD, 3, spacing="linspace", fractional=True)[1]
    assert step.timestep == 499.5
    squares = alphas_cumprod(SD)[499:501]
    assert step.sigma / step.alpha == pytest.approx(np.mean(np.sqrt((1 - squares) / squares)))


def test_the_end_is_the_first_alpha_or_clean():
    assert steps(SD, 5)[-1].alpha == pytest.approx(alphas_cumprod(SD)[0] ** 0.5)
    for clean in (
        steps(SD, 5, ends_clean=True),
        steps(replace(SD, final_alpha_one=True), 5),
    ):
        assert clean[-1] == (0.0, 1.0, 0.0)


def test_the_schedules_own_spacing_goes_before_the_samplers():
    trailing = replace(SD, spacing="trailing")
    assert steps(trailing, 10, spacing="leading") == steps(SD, 10, spacing="trailing")


def test_first_step_of_a_zero_snr_schedule_is_pure_noise():
    for fractional in (False, True):
        first, second = steps(ZERO_SNR, 10, fractional=fractional)[:2]
        assert first == (999.0, 0.0, 1.0)
        assert second.alpha > 0


def test_start_scale_is_sigma_on_a_fractional_grid_at_full_noise():
    euler = {"spacing": "linspace", "fractional": True, "ends_clean": True}
    first = steps(SD, 10, **euler)[0]
    assert start_scale(SD, first, **euler) == first.sigma < 1
    assert start_scale(replace(SD, spacing="leading"), first, **euler) == 1
    assert start_scale(SD, first) == 1


configs = st.builds(
    ScheduleConfig,
    betas=st.sampled_from(["linear", "scaled_linear"]),
    train_steps=st.just(1000),
    prediction=st.just("v"),
    offset=st.sampled_from([0, 1]),
    zero_terminal_snr=st.booleans(),
)


@given(configs, st.sampled_from(["leading", "trailing", "linspace"]), st.booleans(), st.data())
def test_spacings_are_exact_in_number_and_strictly_decreasing(config, spacing, fractional, data):
    num_steps = data.draw(st.integers(1, 499 if spacing == "leading" else 1000))
    levels = np.array(steps(config, num_steps, spacing=spacing, fractional=fractional))
    assert levels.shape == (num_steps + 1, 3)
    times, alphas, sigmas = levels.T
    assert 0 <= times[-2] <= times[0] <= 999
    assert (np.diff(times[:-1]) < 0).all()
    assert (np.diff(alphas[:-1]) > 0).all()
    assert alphas[-1] >= alphas[-2]
    assert alphas**2 + sigmas**2 == pytest.approx(1)
    # A step at an integer has the training's noise there, however it was reached.
    whole = times[:-1] == np.round(times[:-1])
    expected = alphas_cumprod(config)[times[:-1][whole].astype(int)]
    assert (alphas[:-1][whole] == np.sqrt(expected)).all()


@pytest.mark.parametrize(
    ("spacing", "num_steps", "most"),
    [
        ("leading", 0, 499),
        ("leading", 500, 499),
        ("trailing", 1001, 1000),
        ("linspace", -1, 1000),
        ("linspace", 2.5, 1000),
        ("linspace", "25", 1000),
    ],
)
def test_number_of_steps_out_of_range(spacing, num_steps, most):
    with pytest.raises(ValueError, match=f'from 1 to {most} with "{spacing}".*not {num_steps!r}'):
        steps(SD, num_steps, spacing=spacing)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SD, betas="cosine"), "unknown betas 'cosine'; known: linear, scaled_linear"),
        (replace(SD, spacing="even"), "unknown spacing 'even'; known: leading, trailing, linspace"),
        (replace(SD, offset=100), "offset 100 is not below the stride of its timesteps, 100"),
        (replace(ZERO_SNR, prediction="epsilon"), 'zero terminal SNR.*use prediction="v"'),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        steps(config, 10)
