"""Noise schedules, in NumPy float64: how much signal and noise there is at each timestep.

Everywhere `x = alpha * x0 + sigma * eps` with `alpha**2 + sigma**2 = 1` (variance preserving). In
the letters of DDPM (arXiv:2006.11239), `alpha**2` is the cumulated product of `1 - beta`.
"""

from numbers import Integral
from typing import Literal, NamedTuple

import numpy as np

from stable_diffusion_tf.config import ScheduleConfig


class Step(NamedTuple):
    """One noise level: numbers when sampling, arrays that broadcast over a batch when training."""

    timestep: float  # what the network is told, in [0, train_steps)
    alpha: float  # of the signal, in [0, 1]; 0 only at the noisy end of a zero-SNR schedule
    sigma: float  # of the noise, in [0, 1]; 0 only after the last step


class Strided(Step):
    """A step that also knows the levels one stride above and below its own.

    The reference's DDIM and PNDM go from stride to stride, whatever the list's next step is: the
    same with "leading" spacing, a few timesteps off with the others.
    """

    above: Step  # `train_steps // num_steps` timesteps noisier
    below: Step  # as many cleaner: where x gets to


LEAST_SIGNAL = 2.0**-24  # `alpha**2` at the noisy end, for solvers that step in `sigma / alpha`


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
    solver: Literal["euler", "dpm"] | None = None,
    strided: bool = False,
    distilled: int | None = None,
    ends_clean: bool = False,
    schedule: Literal["karras"] | None = None,
) -> list[Step]:
    """Returns the `num_steps` noise levels to denoise at, noisiest first, and the one x ends at.

    The keywords but the last are a sampler's own grid (`SAMPLERS[name].grid`), which follows its
    reference implementation to the timestep.

    Args:
        config: the schedule; its `spacing`, if it names one, goes before the sampler's.
        num_steps: how many times x is denoised: 1 to 499 for "leading", 1 to 1000 for the others
            (with 1000 training timesteps); 1 to 999 for "dpm", 1 to `distilled`.
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2).
        solver: "euler" and "dpm" step in `sigma / alpha`, which a zero-SNR schedule keeps finite
            for them. "euler" has timesteps between the integers, where the noise is interpolated
            linearly in that ratio; "dpm" has those of one step more, without the last.
        strided: whether steps are `Strided`.
        distilled: how many steps, of "trailing" spacing, a consistency model was distilled at,
            among which all timesteps are chosen.
        ends_clean: whether x ends at alpha 1, whatever `config.final_alpha_one` says.
        schedule: "karras": noise levels evenly spaced in `(sigma / alpha) ** (1 / 7)` (Karras et
            al. 2022, arXiv:2206.00364, equation 5), between those of the first and the last
            timestep for "euler", of training for "dpm", which tells the network whole timesteps.

    Raises:
        ValueError: `num_steps` or `config` is out of range, or the network's noise prediction would
            have to find x0 where there is no signal.
    """
    cumulated = alphas_cumprod(config)
    if solver and config.zero_terminal_snr:
        cumulated[-1] = min(LEAST_SIGNAL, cumulated[-2] / 2)
    times = _timesteps(config, num_steps, spacing, solver, distilled)
    squares = _at(cumulated, times)
    if schedule == "karras":
        ends = squares[[0, -1]] if solver == "euler" else cumulated[[-1, 0]]
        times, squares = _karras(cumulated, *ends, num_steps)
        times = times if solver == "euler" else np.round(times)
    no_signal = config.zero_terminal_snr and round(times[0]) == config.train_steps - 1
    if config.prediction == "epsilon" and no_signal:
        raise ValueError(
            "the schedule's first step has no signal (zero terminal SNR), where a noise prediction "
            'says nothing of x0; use prediction="v", or spacing="leading", which starts later'
        )
    end = _step(0, 1.0 if ends_clean or config.final_alpha_one else cumulated[0])
    if strided:
        found = [
            _strided(cumulated, int(time), config.train_steps // num_steps, end) for time in times
        ]
    else:
        found = [_step(*level) for level in zip(times, squares, strict=True)]
    return [*found, end]


def start_scale(
    config: ScheduleConfig,
    first: Step,
    *,
    spacing: str = "leading",
    solver: str | None = None,
    **_grid,
) -> float:
    """Returns what unit noise is multiplied by to start from noise alone at `first`.

    "euler" solvers start from `sigma * eps`, as Karras et al. do (arXiv:2206.00364, algorithm 1),
    unless "leading" spacing starts them below full noise; the others from `eps`.
    """
    return first.sigma if solver == "euler" and (config.spacing or spacing) != "leading" else 1.0


def _step(time: float, square: float) -> Step:
    return Step(float(time), float(np.sqrt(square)), float(np.sqrt(1 - square)))


def _strided(cumulated: np.ndarray, time: int, stride: int, end: Step) -> Strided:
    step = Strided(*_step(time, cumulated[time]))
    above, below = min(time + stride, len(cumulated) - 1), time - stride
    step.above = _step(above, cumulated[above])
    step.below = _step(below, cumulated[below]) if below >= 0 else end
    return step


def _timesteps(
    config: ScheduleConfig,
    num_steps: int,
    spacing: str,
    solver: str | None,
    distilled: int | None,
) -> np.ndarray:
    """Returns (num_steps,) float64 timesteps in [0, train_steps), strictly decreasing."""
    count = config.train_steps
    spacing = "trailing" if distilled else config.spacing or spacing
    if spacing not in ("leading", "trailing", "linspace"):
        raise ValueError(f"unknown spacing {spacing!r}; known: leading, trailing, linspace")
    extra = int(solver == "dpm")
    # From half of them on, "leading" steps would run one by one from the middle of the schedule.
    most = distilled or ((count - 1) // 2 if spacing == "leading" else count - extra)
    whole = isinstance(num_steps, Integral) and not isinstance(num_steps, bool)
    if not (whole and 1 <= num_steps <= most):
        kind = "a sampler of distilled models" if distilled else f'"{spacing}" spacing'
        raise ValueError(
            f"num_steps must be a whole number from 1 to {most} with {kind}, not {num_steps!r}"
        )
    if distilled:
        return _trailing(count, distilled)[_every(distilled, num_steps)]
    if spacing == "trailing":
        return _trailing(count, num_steps)
    if spacing == "leading":
        stride = count // (num_steps + extra)
        if not 0 <= config.offset < stride:
            raise ValueError(
                f"the schedule's offset {config.offset} is not below the stride of its timesteps, "
                f"{stride}; take fewer than {num_steps} steps or an offset of 0 or 1"
            )
        return (np.arange(num_steps)[::-1] + extra) * float(stride) + config.offset
    if num_steps + extra == 1:
        return np.array([count - 1.0])  # linspace would put a single step at the clean end
    times = np.linspace(0, count - 1, num_steps + extra)[::-1][:num_steps]
    return times if solver == "euler" else np.round(times)


def _trailing(count: int, num_steps: int) -> np.ndarray:
    # arange may add one timestep too many, by rounding.
    return np.round(np.arange(count, 0, -count / num_steps)[:num_steps]) - 1


def _every(count: int, num: int) -> np.ndarray:
    """Returns `num` of `count` indices, evenly spaced from the first on."""
    return np.floor(np.linspace(0, count, num, endpoint=False)).astype(int)


def _at(cumulated: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns `alpha**2` at `times`, interpolating linearly in `sigma / alpha` between integers."""
    between = 1 / (1 + np.interp(times, np.arange(len(cumulated)), _ratio(cumulated)) ** 2)
    whole = times.astype(int)
    return np.where(times == whole, cumulated[whole], between)  # the integers' own, to the last bit


def _karras(
    cumulated: np.ndarray, noisiest: float, cleanest: float, num_steps: int, rho: float = 7.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the timesteps, interpolated in `log(sigma / alpha)`, and `alpha**2`: (num_steps,)."""
    first, last = _ratio(np.array([noisiest, cleanest])) ** (1 / rho)
    ratios = np.linspace(first, last, num_steps) ** rho
    times = np.interp(np.log(ratios), np.log(_ratio(cumulated)), np.arange(len(cumulated)))
    return times, 1 / (1 + ratios**2)


def _ratio(squares: np.ndarray) -> np.ndarray:
    """Returns `sigma / alpha` of `alpha**2`."""
    with np.errstate(divide="ignore"):  # alpha 0, where it is infinite
        return np.sqrt((1 - squares) / squares)
