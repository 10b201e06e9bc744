import inspect
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from stable_diffusion_tf.config import ScheduleConfig
from stable_diffusion_tf.diffusion.schedule import Step, steps
from stable_diffusion_tf.samplers import SAMPLERS, Noise, get_sampler

SD = ScheduleConfig()
STOCHASTIC = ("ddpm", "ddpm_small", "euler_ancestral", "dpmpp_2m_sde")
FIRST_ORDER = ("ddim", "euler")
HIGHER_ORDER = ("pndm", "lms", "heun", "dpmpp_2m", "unipc")
NUMBERS = Noise(seeds=range(4), shape=(8, 8, 4))


def gaussian(mean, std):
    """The exact denoiser of data drawn from N(mean, std**2): the posterior's mean of x0."""

    def denoise(x, step):
        gain = step.alpha * std**2 / (step.alpha**2 * std**2 + step.sigma**2)
        return mean + gain * (x - step.alpha * mean)

    return denoise


def run(name, denoise, x, num_steps, noise=NUMBERS, config=SD, **options):
    """The last x of a trajectory."""
    row = get_sampler(name)
    levels = steps(config, num_steps, **row.grid)
    options = row.options(prediction=config.prediction, **options)
    *_, (last, _) = row.sample(denoise, x, levels, noise, **options)
    return last


def flow_end(x, first, last, mean, std):
    """Where the exact probability flow takes x: it keeps the distance from the mean, in stds."""
    deviations = [np.hypot(step.alpha * std, step.sigma) for step in (first, last)]
    return last.alpha * mean + (x - first.alpha * mean) * deviations[1] / deviations[0]


def flow_errors(name, counts, start=0):
    """How far from the exact probability flow a sampler ends that takes so many even steps.

    The first `start` hundredths of the steps are left out, as in image-to-image.
    """
    mean, std = 0.7, 0.3
    x, row = NUMBERS.start().astype(np.float64), get_sampler(name)
    for count in counts:
        config = ScheduleConfig(spacing="trailing")
        levels = steps(config, count, **{**row.grid, "ends_clean": False})[start * count // 100 :]
        *_, (end, _) = row.sample(gaussian(mean, std), x, levels, NUMBERS)
        exact = flow_end(x, levels[0], levels[-1], mean, std)
        yield np.linalg.norm(end - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("start", [0, 50])
@pytest.mark.parametrize("name", FIRST_ORDER + HIGHER_ORDER)
def test_deterministic_samplers_converge_to_the_probability_flow_at_their_order(name, start):
    errors = list(flow_errors(name, (50, 100, 200), start))
    assert errors[-1] < (0.015 if name in FIRST_ORDER else 0.01)
    coarse, fine = errors[-2:]
    assert fine < (0.6 if name in FIRST_ORDER else 0.4) * coarse


def test_higher_orders_are_nearer_to_the_flow_in_few_steps():
    (euler,) = flow_errors("euler", (25,))
    for name in HIGHER_ORDER:
        (error,) = flow_errors(name, (25,))
        assert error < euler


@pytest.mark.parametrize("name", STOCHASTIC)
def test_ancestral_samplers_draw_from_the_data(name):
    x = run(name, gaussian(0.7, 0.3), NUMBERS.start().astype(np.float64), 200)
    assert x.mean() == pytest.approx(0.7, abs=0.03)
    assert x.std() == pytest.approx(0.3, abs=0.03)


def test_lcm_draws_from_the_data_with_an_exact_consistency_function():
    mean, std = 0.7, 0.3

    def consistency(x, step):
        return flow_end(x, step, Step(0.0, 1.0, 0.0), mean, std)

    for num_steps in (1, 4):
        x = run("lcm", consistency, NUMBERS.start().astype(np.float64), num_steps)
        assert x.mean() == pytest.approx(mean, abs=0.05)
        assert x.std() == pytest.approx(std, abs=0.03)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_few_and_many_steps_stay_finite(name, num_steps, prediction):
    for spacing in (None, "leading", "trailing", "linspace"):
        config = ScheduleConfig(prediction=prediction, spacing=spacing)
        x = run(name, gaussian(0.7, 0.3), NUMBERS.start(), num_steps, config=config)
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name].takes_karras])
def test_karras_levels_lead_to_the_data_too(name):
    row = get_sampler(name)
    for num_steps in (1, 2, 3, 50):
        levels = steps(SD, num_steps, **row.grid_on("karras"))
        *_, (x, _) = row.sample(gaussian(0.7, 0.3), NUMBERS.start(), levels, NUMBERS)
        assert np.isfinite(x).all()
    assert x.mean() == pytest.approx(0.7, abs=0.05)
    assert x.std() == pytest.approx(0.3, abs=0.05)


def test_pndm_combines_what_the_network_predicts():
    row, start = get_sampler("pndm"), NUMBERS.start().astype(np.float64)
    epsilon, v = (
        run("pndm", gaussian(0.7, 0.3), start, 5, config=ScheduleConfig(prediction=prediction))
        for prediction in ("epsilon", "v")
    )
    assert row.options(prediction="v") == {"prediction": "v"}
    assert 1e-4 < np.linalg.norm(epsilon - v) / np.linalg.norm(v) < 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_known_data_are_found_in_one_step(name):
    def denoise(x, step):
        return 0 * x + 0.25

    x = run(name, denoise, NUMBERS.start(), 1, config=ScheduleConfig(final_alpha_one=True))
    np.testing.assert_allclose(x, 0.25, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_start_without_signal_is_finite(name):
    config = ScheduleConfig(prediction="v", spacing="trailing", zero_terminal_snr=True)
    for options in ({}, {"eta": 1.0}) if name == "ddim" else ({},):
        x = run(name, gaussian(0.7, 0.3), NUMBERS.start(), 10, config=config, **options)
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_few_steps_from_no_signal_draw_no_more_than_the_data_vary(name):
    config, row = ScheduleConfig(prediction="v", zero_terminal_snr=True), get_sampler(name)
    options = row.options(prediction="v")
    for spacing, num_steps in product(("trailing", "linspace"), (2, 3, 4, 6, 8, 10, 15)):
        levels = steps(replace(config, spacing=spacing), num_steps, **row.grid_on(None))
        *_, (x, _) = row.sample(gaussian(0, 1), NUMBERS.start(), levels, NUMBERS, **options)
        assert x.std() < 1.3, (spacing, num_steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_lazy_and_pure(name):
    calls = []

    def denoise(x, step):
        calls.append(step)
        return 0.5 * x

    row = SAMPLERS[name]
    levels = steps(SD, 6, **row.grid)
    start = NUMBERS.start()
    before = start.copy()
    trajectory = row.sample(denoise, start, levels, NUMBERS)
    assert inspect.isgenerator(trajectory)
    assert calls == []
    next(trajectory)
    assert calls[0] == levels[0]
    assert len(calls) == {"heun": 2, "pndm": 2}.get(name, 1)
    list(trajectory)
    assert list(dict.fromkeys(calls)) == levels[:-1]
    assert (start == before).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_stays_float32_and_agrees_with_float64(name):
    start = NUMBERS.start()
    single = run(name, gaussian(0.7, 0.3), start, 10)
    double = run(name, gaussian(0.7, 0.3), start.astype(np.float64), 10)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_backends_arrays_agree_with_numpy(name, backend):
    if backend == "tensorflow":
        array = pytest.importorskip("tensorflow").constant
    else:
        array = pytest.importorskip("jax.numpy").asarray
    start = NUMBERS.start()
    x = run(name, gaussian(0.7, 0.3), array(start), 5)
    assert type(x) is type(array(start))
    np.testing.assert_allclose(x, run(name, gaussian(0.7, 0.3), start, 5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_temperature_scales_the_noise(name):
    def half(i):
        return 0.5 * NUMBERS(i)

    start, denoise = NUMBERS.start(), gaussian(0.7, 0.3)
    tempered = run(name, denoise, start, 10, temperature=0.5)
    np.testing.assert_allclose(tempered, run(name, denoise, start, 10, half), atol=1e-6)


def test_deterministic_samplers_draw_no_noise():
    def never(i):
        raise AssertionError("noise was drawn")

    for name in FIRST_ORDER + HIGHER_ORDER:
        run(name, gaussian(0.7, 0.3), NUMBERS.start(), 5, never)


def test_ddim_at_eta_1_is_ddpm_with_the_small_variance():
    levels = steps(SD, 10)
    start, denoise = NUMBERS.start().astype(np.float64), gaussian(0.7, 0.3)
    ancestral = list(SAMPLERS["ddim"].sample(denoise, start, levels, NUMBERS, eta=1.0))
    ddpm = list(SAMPLERS["ddpm_small"].sample(denoise, start, levels, NUMBERS))
    np.testing.assert_allclose(ancestral[-1][0], ddpm[-1][0], atol=1e-12)


def test_options_are_those_that_the_sampler_takes():
    assert get_sampler("ddim").options(0.5, 0.9) == {"eta": 0.5, "temperature": 0.9}
    assert get_sampler("ddpm").options(0, 0.9) == {"temperature": 0.9}
    assert get_sampler("euler").options(0, 0.9) == {}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"eta": 1.5}, "eta must be from 0.*not 1.5"),
        ("ddim", {"eta": float("nan")}, "eta must be from 0.*not nan"),
        ("euler", {"eta": 0.5}, "has no eta .*: ddim$"),
        ("ddpm", {"temperature": -1}, "temperature must be a number, 0 or more, not -1"),
        ("ddim", {"temperature": float("nan")}, "temperature must be.*not nan"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_sampler(name).options(**options)


@pytest.mark.parametrize("name", ["plm", "", None, ["ddim"]])
def test_an_unknown_sampler_is_answered_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"unknown sampler .*; known: {', '.join(SAMPLERS)}$"):
        get_sampler(name)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("Euler a", "euler_ancestral"),
        ("PLMS", "pndm"),
        ("DDIM", "ddim"),
        ("EulerDiscreteScheduler", "euler"),
        ("DDPMScheduler", "ddpm_small"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde, on Karras's noise levels"),
    ],
)
def test_another_program_s_name_is_answered_with_ours(name, ours):
    with pytest.raises(
        ValueError, match=f"^unknown sampler '{re.escape(name)}'; here it is {ours}$"
    ):
        get_sampler(name)


def test_two_samplers_have_no_name_in_a1111():
    assert {name for name, row in SAMPLERS.items() if not row.a1111} == {"ddpm", "ddpm_small"}


def test_a_schedule_is_refused_where_it_does_not_apply():
    assert get_sampler("ddim").grid_on(None) == get_sampler("ddim").grid
    assert get_sampler("euler").grid_on("karras")["schedule"] == "karras"
    for name in ("ddim", "ddpm", "pndm", "lcm"):
        with pytest.raises(ValueError, match=r"'karras' does not apply; samplers that .*dpmpp_2m"):
            get_sampler(name).grid_on("karras")
    with pytest.raises(ValueError, match="unknown schedule 'cosine'; known: None, karras"):
        get_sampler("euler").grid_on("cosine")
