"""Samplers: pure generators `sampler(denoise, x, steps, noise, **options)`.

`denoise(x, step) -> x0` is the model's estimate of the clean latents, `x` (B, h, w, c) the latents
at `steps[0]`, `steps` a list of `(timestep, alpha, sigma)` with `x = alpha * x0 + sigma * eps`,
and `noise(i)` the unit normal draw of step i, shaped as x. A sampler yields `(x, x0)` after each of
the `len(steps) - 1` steps: the latents at `steps[i + 1]` and the estimate that led there. It uses
operators and Python numbers only, so x may be an array of TensorFlow, JAX or NumPy, float64 too.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from stable_diffusion_tf.samplers.ddim import ddim
from stable_diffusion_tf.samplers.ddpm import ddpm
from stable_diffusion_tf.samplers.euler import euler, euler_ancestral
from stable_diffusion_tf.samplers.noise import STREAMS as STREAMS
from stable_diffusion_tf.samplers.noise import Noise as Noise
from stable_diffusion_tf.samplers.noise import picture_seeds as picture_seeds


@dataclass(frozen=True)
class Sampler:
    """One row of the table: a sampler, and what it wants from its caller."""

    sample: Callable
    description: str
    grid: Mapping = field(default_factory=dict)  # keywords of `schedule.steps`: where it steps
    accepts: tuple[str, ...] = ()  # of "eta" and "temperature"

    def options(self, eta: float = 0.0, temperature: float = 1.0) -> dict[str, float]:
        """Checks a caller's options and returns those that `sample` takes.

        `temperature` has nothing to scale in a deterministic sampler, which goes without it.

        Raises:
            ValueError: `eta` is outside [0, 1], or not 0 where the sampler has none; `temperature`
                is negative or not finite.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 (deterministic) to 1 (ancestral), not {eta!r}")
        if eta and "eta" not in self.accepts:
            known = ", ".join(name for name, row in SAMPLERS.items() if "eta" in row.accepts)
            raise ValueError(f"this sampler has no eta ({eta!r} given); samplers with one: {known}")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be a number, 0 or more, not {temperature!r}")
        given = {"eta": eta, "temperature": temperature}
        return {name: given[name] for name in self.accepts}


_TO_CLEAN = {"ends_clean": True}
_FRACTIONAL = {"spacing": "linspace", "fractional": True, "ends_clean": True}

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(
        ddim,
        "deterministic at eta 0, ancestral at eta 1; the published default",
        accepts=("eta", "temperature"),
    ),
    "ddpm": Sampler(
        ddpm,
        "ancestral, the larger of the two fixed variances; wants many steps",
        _TO_CLEAN,
        ("temperature",),
    ),
    "ddpm_small": Sampler(
        partial(ddpm, variance="small"),
        "ancestral, the smaller of the two fixed variances",
        _TO_CLEAN,
        ("temperature",),
    ),
    "euler": Sampler(
        euler,
        "deterministic, first order, at evenly spaced fractional timesteps",
        _FRACTIONAL,
    ),
    "euler_ancestral": Sampler(
        euler_ancestral,
        "Euler's steps with fresh noise after each; varied pictures",
        _FRACTIONAL,
        ("temperature",),
    ),
}


def get_sampler(name: str) -> Sampler:
    """Returns the sampler called `name`.

    Raises:
        ValueError: there is none; lists the known ones.
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
