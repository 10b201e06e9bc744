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
    step = steps(SD, 3, spacing="linspace", solver="euler")[1]
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


def test_dpm_solvers_have_the_timesteps_of_one_step_more():
    for spacing, expected in (
        ("leading", [801, 601, 401, 201, 0]),
        ("trailing", [999, 749, 499, 249, 0]),
        ("linspace", [999, 749, 500, 250, 0]),
    ):
        found = steps(replace(SD, spacing=spacing), 4, solver="dpm")
        assert [step.timestep for step in found] == expected


def test_distilled_timesteps_are_chosen_among_the_trailing_ones():
    for spacing in (None, "leading"):
        found = steps(replace(SD, spacing=spacing), 3, distilled=50)
        assert [step.timestep for step in found] == [999, 679, 339, 0]


def test_a_stride_is_the_next_step_with_leading_spacing_only():
    found = steps(SD, 3, strided=True)
    assert [step.below for step in found[:-1]] == found[1:]
    assert [step.above for step in found[1:-1]] == found[:-2]
    found = steps(SD, 3, spacing="linspace", strided=True)
    assert [step.timestep for step in found[:-1]] == [999, 500, 0]
    assert [step.below.timestep for step in found[:-1]] == [666, 167, 0]
    assert [step.above.timestep for step in found[1:-1]] == [833, 333]
    assert found[2].below == found[-1]


@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_karras_levels_are_evenly_spaced_in_the_seventh_root(solver):
    found = steps(SD, 10, spacing="linspace", solver=solver, schedule="karras")[:-1]
    roots = [(step.sigma / step.alpha) ** (1 / 7) for step in found]
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0])
    squares = alphas_cumprod(SD)[[999, 0]]
    ends = [(step.sigma / step.alpha) for step in (found[0], found[-1])]
    np.testing.assert_allclose(ends, np.sqrt((1 - squares) / squares))
    times = np.array([step.timestep for step in found])
    assert (times[0], times[-1]) == pytest.approx((999, 0), abs=1e-9)
    assert (times == np.round(times)).all() == (solver == "dpm")


def test_a_karras_timestep_is_where_training_had_its_noise():
    for step in steps(SD, 10, spacing="linspace", solver="euler", schedule="karras")[:-1]:
        below, above = int(step.timestep), min(int(step.timestep) + 1, 999)
        low, high = np.sqrt(alphas_cumprod(SD)[[above, below]])
        assert low - 1e-9 <= step.alpha <= high + 1e-9


def test_first_step_of_a_zero_snr_schedule_is_pure_noise():
    first, second = steps(ZERO_SNR, 10)[:2]
    assert first == (999.0, 0.0, 1.0)
    assert second.alpha > 0


@pytest.mark.parametrize("schedule", [None, "karras"])
@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_solvers_in_sigma_over_alpha_start_just_short_of_it(solver, schedule):
    first = steps(ZERO_SNR, 10, solver=solver, schedule=schedule)[0]
    assert first.timestep == pytest.approx(999)
    assert first.alpha == pytest.approx(2**-12)


def test_start_scale_is_sigma_for_eulers_solvers_at_full_noise():
    euler = {"spacing": "linspace", "solver": "euler", "ends_clean": True}
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


@given(
    configs,
    st.sampled_from(["leading", "trailing", "linspace"]),
    st.sampled_from([None, "euler", "dpm"]),
    st.data(),
)
def test_spacings_are_exact_in_number_and_strictly_decreasing(config, spacing, solver, data):
    num_steps = data.draw(st.integers(1, 499 if spacing == "leading" else 999))
    levels = np.array(steps(config, num_steps, spacing=spacing, solver=solver))
    assert levels.shape == (num_steps + 1, 3)
    times, alphas, sigmas = levels.T
    assert 0 <= times[-2] <= times[0] <= 999
    assert (np.diff(times[:-1]) < 0).all()
    assert (np.diff(alphas[:-1]) > 0).all()
    assert alphas[-1] >= alphas[-2]
    assert alphas**2 + sigmas**2 == pytest.approx(1)
    # A step at an integer has the training's noise there, however it was reached.
    whole = times[:-1] == np.round(times[:-1])
    expected = np.sqrt(alphas_cumprod(config)[times[:-1][whole].astype(int)])
    if solver and config.zero_terminal_snr:
        expected[expected == 0] = alphas[0]
    assert (alphas[:-1][whole] == expected).all()


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
    ("grid", "message"),
    [
        ({"distilled": 50}, "from 1 to 50 with a sampler of distilled models, not 1000"),
        ({"solver": "dpm", "spacing": "linspace"}, 'from 1 to 999 with "linspace" spacing'),
    ],
)
def test_number_of_steps_out_of_a_samplers_range(grid, message):
    with pytest.raises(ValueError, match=message):
        steps(SD, 1000, **grid)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SD, betas="cosine"), "unknown betas 'cosine'; known: linear, scaled_linear"),
        (replace(SD, spacing="even"), "unknown spacing 'even'; known: leading, trailing, linspace"),
        (replace(SD, offset=200), "offset 200 is not below the stride of its timesteps, 1"),
        (replace(ZERO_SNR, prediction="epsilon"), 'zero terminal SNR.*use prediction="v"'),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(config, message):
    for solver in (None, "euler", "dpm"):
        with pytest.raises(ValueError, match=message):
            steps(config, 9, solver=solver)
