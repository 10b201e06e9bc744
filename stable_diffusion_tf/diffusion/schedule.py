"""Noise schedules, in NumPy float64: how much signal and noise there is at each timestep.

Everywhere `x = alpha * x0 + sigma * eps` with `alpha**2 + sigma**2 = 1` (variance preserving). In
the letters of DDPM (arXiv:2006.11239), `alpha**2` is the cumulated product of `1 - beta`.
"""

from numbers import Integral
from typing import NamedTuple

import numpy as np

from stable_diffusion_tf.config import ScheduleConfig


class Step(NamedTuple):
    """One noise level: numbers when sampling, arrays that broadcast over a batch when training."""

    timestep: float  # what the network is told, in [0, train_steps)
    alpha: float  # of the signal, in [0, 1]; 0 only at the noisy end of a zero-SNR schedule
    sigma: float  # of the noise, in [0, 1]; 0 only after the last step


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """Returns `alpha**2` at each training timestep: (train_steps,) float64, decreasing.

    "linear" betas are DDPM's (arXiv:2006.11239, section 4), "scaled_linear" those of latent
    diffusion: linear in the square root.
    """
    start, end, count = config.beta_start, config.beta_end, config.train_steps
    if config.betas == "linear":
        betas = np.linspace(start, end, count)
    elif config.betas == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    else:
        raise ValueError(f"unknown betas {config.betas!r}; known: linear, scaled_linear")
    cumulated = np.cumprod(1 - betas)
    return _zero_terminal_snr(cumulated) if config.zero_terminal_snr else cumulated


def _zero_terminal_snr(cumulated: np.ndarray) -> np.ndarray:
    """Shifts and scales alpha so that the first stays and the last is 0.

    Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """
    alphas = np.sqrt(cumulated)
    first, last = alphas[0], alphas[-1]
    return ((alphas - last) * first / (first - last)) ** 2


def steps(
    config: ScheduleConfig,
    num_steps: int,
    *,
    spacing: str = "leading",
    fractional: bool = False,
    ends_clean: bool = False,
) -> list[Step]:
    """Returns the `num_steps` noise levels to denoise at, noisiest first, and the one x ends at.

    The keywords are a sampler's own grid (`SAMPLERS[name].grid`).

    Args:
        config: the schedule; its `spacing`, if it names one, goes before the sampler's.
        num_steps: how many times x is denoised: 1 to 499 for "leading", 1 to 1000 for the others
            (with 1000 training timesteps).
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2).
        fractional: whether "linspace" keeps timesteps between the integers; the noise there is
            interpolated linearly in `sigma / alpha`.
        ends_clean: whether x ends at alpha 1, whatever `config.final_alpha_one` says.

    Raises:
        ValueError: `num_steps` or `config` is out of range, or the network's noise prediction would
            have to find x0 where there is no signal.
    """
    times = _timesteps(config, num_steps, config.spacing or spacing, fractional)
    cumulated = alphas_cumprod(config)
    squares = _at(cumulated, times)
    if config.prediction == "epsilon" and squares[0] == 0:
        raise ValueError(
            "the schedule's first step has no signal (zero terminal SNR), where a noise prediction "
            'says nothing of x0; use prediction="v", or spacing="leading", which starts later'
        )
    last = 1.0 if ends_clean or config.final_alpha_one else cumulated[0]
    return [
        Step(float(time), float(np.sqrt(square)), float(np.sqrt(1 - square)))
        for time, square in zip([*times, 0], [*squares, last], strict=True)
    ]


def start_scale(
    config: ScheduleConfig,
    first: Step,
    *,
    spacing: str = "leading",
    fractional: bool = False,
    ends_clean: bool = False,
) -> float:
    """Returns what unit noise is multiplied by to start from noise alone at `first`.

    Samplers with a fractional grid start from `sigma * eps`, as Karras et al. do (arXiv:2206.00364,
    algorithm 1), unless "leading" spacing starts them below full noise; the others from `eps`.
    """
    return first.sigma if fractional and (config.spacing or spacing) != "leading" else 1.0


def _timesteps(
    config: ScheduleConfig, num_steps: int, spacing: str, fractional: bool
) -> np.ndarray:
    """Returns (num_steps,) float64 timesteps in [0, train_steps), strictly decreasing."""
    count = config.train_steps
    if spacing not in ("leading", "trailing", "linspace"):
        raise ValueError(f"unknown spacing {spacing!r}; known: leading, trailing, linspace")
    # From half of them on, "leading" steps would run one by one from the middle of the schedule.
    most = (count - 1) // 2 if spacing == "leading" else count
    if not isinstance(num_steps, Integral) or not 1 <= num_steps <= most:
        raise ValueError(
            f'num_steps must be a whole number from 1 to {most} with "{spacing}" spacing, '
            f"not {num_steps!r}"
        )
    if spacing == "leading":
        stride = count // num_steps
        if not 0 <= config.offset < stride:
            raise ValueError(
                f"the schedule's offset {config.offset} is not below the stride of its timesteps, "
                f"{stride}; take fewer than {num_steps} steps or an offset of 0 or 1"
            )
        return np.arange(num_steps)[::-1] * float(stride) + config.offset
    if spacing == "trailing":
        # arange may add one timestep too many, by rounding.
        return np.round(np.arange(count, 0, -count / num_steps)[:num_steps]) - 1
    if num_steps == 1:
        return np.array([count - 1.0])  # linspace would put a single step at the clean end
    times = np.linspace(0, count - 1, num_steps)[::-1]
    return times if fractional else np.round(times)


def _at(cumulated: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns `alpha**2` at `times`, interpolating linearly in `sigma / alpha` between integers."""
    with np.errstate(divide="ignore"):  # alpha 0, where the ratio is infinite
        ratios = np.sqrt((1 - cumulated) / cumulated)
    between = 1 / (1 + np.interp(times, np.arange(len(cumulated)), ratios) ** 2)
    whole = times.astype(int)
    return np.where(times == whole, cumulated[whole], between)  # the integers' own, to the last bit
