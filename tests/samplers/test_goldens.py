"""Against what the reference implementation computed, with its network replaced by a formula."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from stable_diffusion_tf.config import ScheduleConfig
from stable_diffusion_tf.diffusion.denoiser import denoiser
from stable_diffusion_tf.diffusion.schedule import start_scale, steps
from stable_diffusion_tf.samplers import SAMPLERS

GOLDENS = np.load(Path(__file__).parents[1] / "data" / "samplers.npz")

SD = ScheduleConfig()
SD_V = ScheduleConfig(prediction="v")
DDPM = ScheduleConfig(betas="linear", beta_start=1e-4, beta_end=0.02, offset=0)
ZERO_SNR = ScheduleConfig(
    prediction="v", spacing="trailing", final_alpha_one=True, zero_terminal_snr=True
)
SETTINGS = {
    "ddim_leading": ("ddim", SD, {}),
    "ddim_leading_eta1": ("ddim", SD, {"eta": 1.0}),
    "ddim_v": ("ddim", SD_V, {}),
    "ddim_trailing_zsnr_v": ("ddim", ZERO_SNR, {}),
    "ddpm": ("ddpm", DDPM, {}),
    "ddpm_small": ("ddpm_small", DDPM, {}),
    "euler": ("euler", SD, {}),
    "euler_leading": ("euler", ScheduleConfig(spacing="leading"), {}),
    "euler_ancestral": ("euler_ancestral", SD, {}),
}


def normal(name):
    """The unit normal array that the goldens were computed from."""
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(f"input/A{name}".encode())))
    return generator.standard_normal((2, 8, 12, 4), dtype=np.float32).astype(np.float64)


def network(x, timesteps, context):
    t = np.asarray(timesteps, np.float64)[:, None, None, None]
    return 0.9 * np.sqrt((t + 1) / 1001) * x + 0.1 * np.sin(x + t / 50)


def relative_error(value, reference):
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)


@pytest.fixture(params=[f"{name}@{n}" for name in SETTINGS for n in (10, 25)])
def case(request):
    """The prefix of the setting's goldens, its sampler, schedule, steps and options."""
    name, num_steps = request.param.split("@")
    sampler, config, options = SETTINGS[name]
    row = SAMPLERS[sampler]
    return request.param, row, config, steps(config, int(num_steps), **row.grid), options


def test_steps_are_the_references(case):
    key, row, config, levels, _ = case
    times, alphas, sigmas = np.array(levels).T
    reference = GOLDENS[f"{key}/timesteps"]
    fractional = (reference != np.round(reference)).any()
    np.testing.assert_allclose(times[:-1], reference, rtol=0, atol=2e-3 if fractional else 0)
    scale = start_scale(config, levels[0], **row.grid)
    if f"{key}/sigmas" in GOLDENS:  # of x / alpha
        scale /= alphas[0]
        assert relative_error(sigmas / alphas, GOLDENS[f"{key}/sigmas"]) <= 2e-6
    assert scale == pytest.approx(GOLDENS[f"{key}/init_noise_sigma"], rel=2e-6)


def test_trajectory_ends_where_the_references_does(case):
    key, row, config, levels, options = case
    denoise = denoiser(network, config.prediction, context=None)
    start = start_scale(config, levels[0], **row.grid) * normal(f"{key}/x_T")
    trajectory = list(
        row.sample(denoise, start, levels, lambda i: normal(f"{key}/noise{i}"), **options)
    )
    assert len(trajectory) == len(levels) - 1
    assert relative_error(trajectory[-1][0], GOLDENS[f"{key}/x_0"]) <= 1e-5
