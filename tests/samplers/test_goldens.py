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
EULERS = ("euler", "euler_ancestral", "lms", "heun")
KARRAS = {"schedule": "karras"}
SETTINGS = {  # sampler, schedule, further keywords of its grid, its options
    "ddim_leading": ("ddim", SD, {}, {}),
    "ddim_leading_eta1": ("ddim", SD, {}, {"eta": 1.0}),
    "ddim_v": ("ddim", SD_V, {}, {}),
    "ddim_trailing_zsnr_v": ("ddim", ZERO_SNR, {}, {}),
    "pndm": ("pndm", SD, {}, {}),
    "lms": ("lms", SD, {}, {}),
    "euler": ("euler", SD, {}, {}),
    "euler_leading": ("euler", ScheduleConfig(spacing="leading"), {}, {}),
    "euler_karras": ("euler", SD, KARRAS, {}),
    "euler_ancestral": ("euler_ancestral", SD, {}, {}),
    "heun": ("heun", SD, {}, {}),
    "dpmpp_2m": ("dpmpp_2m", SD, {}, {}),
    "dpmpp_2m_karras": ("dpmpp_2m", SD, KARRAS, {}),
    "dpmpp_2m_sde_karras": ("dpmpp_2m_sde", SD, KARRAS, {}),
    "unipc": ("unipc", SD, {}, {}),
    "ddpm": ("ddpm", DDPM, {}, {}),
    "ddpm_small": ("ddpm_small", DDPM, {}, {}),
    "lcm": ("lcm", SD, {}, {}),
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


@pytest.fixture(scope="module", params=[f"{name}@{n}" for name in SETTINGS for n in (10, 25)])
def run(request):
    """The prefix of the setting's goldens, start's scale, visited steps, draws, and where x ends.

    The visited steps are those that the network was asked at, and the one that x ends at.
    """
    name, num_steps = request.param.split("@")
    sampler, config, schedule, options = SETTINGS[name]
    row = SAMPLERS[sampler]
    grid = {**row.grid, **schedule}
    levels = steps(config, int(num_steps), **grid)
    scale = start_scale(config, levels[0], **grid)
    visited, drawn = [], []

    def denoise(x, step):
        visited.append(step)
        return denoiser(network, config.prediction, context=None)(x, step)

    def noise(i):
        drawn.append(i)
        return normal(f"{request.param}/noise{i}")

    *_, (end, _) = row.sample(
        denoise, scale * normal(f"{request.param}/x_T"), levels, noise, **options
    )
    return request.param, scale, [*visited, levels[-1]], drawn, end


def test_steps_are_the_references(run):
    key, scale, visited, _, _ = run
    times, alphas, sigmas = np.array(visited).T
    reference = GOLDENS[f"{key}/timesteps"]
    fractional = (reference != np.round(reference)).any()
    np.testing.assert_allclose(times[:-1], reference, rtol=0, atol=2e-3 if fractional else 0)
    if f"{key}/sigmas" in GOLDENS:  # of x / alpha
        assert relative_error(sigmas / alphas, GOLDENS[f"{key}/sigmas"]) <= 2e-6
    # The reference's Euler scales x / alpha.
    scale = scale / alphas[0] if SETTINGS[key.split("@")[0]][0] in EULERS else scale
    assert scale == pytest.approx(GOLDENS[f"{key}/init_noise_sigma"], rel=2e-6)


def test_trajectory_ends_where_the_references_does(run):
    key, _, _, drawn, end = run
    # The reference may also draw the last step's, and multiply it by 0.
    assert drawn in [list(range(GOLDENS[f"{key}/noises_used"] - unused)) for unused in (0, 1)]
    assert relative_error(end, GOLDENS[f"{key}/x_0"]) <= 1e-5
