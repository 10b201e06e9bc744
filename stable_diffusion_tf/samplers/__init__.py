"""Samplers: pure generators `sampler(denoise, x, steps, noise, **options)`.

`denoise(x, step) -> x0` is the model's estimate of the clean latents, `x` (B, h, w, c) the latents
at `steps[0]`, `steps` a list of `(timestep, alpha, sigma)` with `x = alpha * x0 + sigma * eps`,
and `noise(i)` the unit normal draw of step i, shaped as x. A sampler yields `(x, x0)` after each of
the `len(steps) - 1` steps: the latents at `steps[i + 1]` and the estimate that led there. It uses
operators and Python numbers only, so x may be an array of TensorFlow, JAX or NumPy, float64 too.

Image-to-image gives a sampler the last of a list's steps only; multistep ones then start anew, with
lower orders first.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from stable_diffusion_tf.samplers.ddim import ddim
from stable_diffusion_tf.samplers.ddpm import ddpm
from stable_diffusion_tf.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde
from stable_diffusion_tf.samplers.euler import euler, euler_ancestral
from stable_diffusion_tf.samplers.heun import heun
from stable_diffusion_tf.samplers.lcm import lcm
from stable_diffusion_tf.samplers.lms import lms
from stable_diffusion_tf.samplers.noise import STREAMS as STREAMS
from stable_diffusion_tf.samplers.noise import Noise as Noise
from stable_diffusion_tf.samplers.noise import picture_seeds as picture_seeds
from stable_diffusion_tf.samplers.pndm import pndm
from stable_diffusion_tf.samplers.unipc import unipc


@dataclass(frozen=True)
class Sampler:
    """One row of the table: a sampler, and what it wants from its caller."""

    sample: Callable
    description: str
    grid: Mapping = field(default_factory=dict)  # keywords of `schedule.steps`: where it steps
    accepts: tuple[str, ...] = ()  # of "eta", "temperature" and "prediction"
    diffusers: str = ""  # what it is called there, with the arguments that make it this one
    a1111: str = ""  # and by A1111's web UI

    @property
    def takes_karras(self) -> bool:
        """Whether it may step at any noise levels, Karras's among them."""
        return "solver" in self.grid

    def grid_on(self, schedule: str | None) -> Mapping:
        """Returns `grid`, on the noise levels called `schedule`: "karras"; None: its own.

        Raises:
            ValueError: the schedule is unknown, or the sampler cannot step on it.
        """
        if schedule is None:
            return self.grid
        if schedule != "karras":
            raise ValueError(f"unknown schedule {schedule!r}; known: None, karras")
        if not self.takes_karras:
            known = ", ".join(name for name, row in SAMPLERS.items() if row.takes_karras)
            raise ValueError(
                "this sampler steps at its own timesteps, where schedule 'karras' does not apply; "
                f"samplers that take it: {known}"
            )
        return {**self.grid, "schedule": schedule}

    def options(
        self, eta: float = 0.0, temperature: float = 1.0, prediction: str = "epsilon"
    ) -> dict[str, Any]:
        """Checks a caller's options and returns those that `sample` takes.

        `temperature` has nothing to scale in a deterministic sampler, which goes without it; only
        `pndm` needs to know the network's `prediction`.

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
        given = {"eta": eta, "temperature": temperature, "prediction": prediction}
        return {name: given[name] for name in self.accepts}


_STRIDED = {"strided": True}
_TO_CLEAN = {"ends_clean": True}
_EULER = {"spacing": "linspace", "solver": "euler", "ends_clean": True}
_DPM = {"spacing": "linspace", "solver": "dpm", "ends_clean": True}
_DISTILLED = {"distilled": 50, "ends_clean": True}

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(
        ddim,
        "deterministic at eta 0, ancestral at eta 1; the published default",
        _STRIDED,
        ("eta", "temperature"),
        diffusers="DDIMScheduler",
        a1111="DDIM",
    ),
    "ddpm": Sampler(
        ddpm,
        "ancestral, the larger of the two fixed variances; wants many steps",
        _TO_CLEAN,
        ("temperature",),
        diffusers='DDPMScheduler, variance_type="fixed_large"',
    ),
    "ddpm_small": Sampler(
        partial(ddpm, variance="small"),
        "ancestral, the smaller of the two fixed variances",
        _TO_CLEAN,
        ("temperature",),
        diffusers="DDPMScheduler",
    ),
    "pndm": Sampler(
        pndm,
        "deterministic, the last four outputs combined (PLMS)",
        _STRIDED,
        ("prediction",),
        diffusers="PNDMScheduler, skip_prk_steps=True",
        a1111="PLMS",
    ),
    "lms": Sampler(
        lms,
        "deterministic, Euler's steps with the last four slopes combined",
        _EULER,
        diffusers="LMSDiscreteScheduler",
        a1111="LMS",
    ),
    "euler": Sampler(
        euler,
        "deterministic, first order, at evenly spaced fractional timesteps",
        _EULER,
        diffusers="EulerDiscreteScheduler",
        a1111="Euler",
    ),
    "euler_ancestral": Sampler(
        euler_ancestral,
        "Euler's steps with fresh noise after each; varied pictures",
        _EULER,
        ("temperature",),
        diffusers="EulerAncestralDiscreteScheduler",
        a1111="Euler a",
    ),
    "heun": Sampler(
        heun,
        "deterministic, second order; two evaluations a step",
        _EULER,
        diffusers="HeunDiscreteScheduler",
        a1111="Heun",
    ),
    "dpmpp_2m": Sampler(
        dpmpp_2m,
        "deterministic, second order; good pictures in 15 to 25 steps",
        _DPM,
        diffusers="DPMSolverMultistepScheduler",
        a1111="DPM++ 2M",
    ),
    "dpmpp_2m_sde": Sampler(
        dpmpp_2m_sde,
        "dpmpp_2m with fresh noise after each step; varied pictures",
        _DPM,
        ("temperature",),
        diffusers='DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"',
        a1111="DPM++ 2M SDE",
    ),
    "unipc": Sampler(
        unipc,
        "deterministic, second order, each step corrected; good in 10 to 20",
        _DPM,
        diffusers="UniPCMultistepScheduler",
        a1111="UniPC",
    ),
    "lcm": Sampler(
        lcm,
        "for models distilled to latent consistency: 1 to 8 steps, 50 at most",
        _DISTILLED,
        ("temperature",),
        diffusers="LCMScheduler",
        a1111="LCM",
    ),
}


def get_sampler(name: str) -> Sampler:
    """Returns the sampler called `name`.

    Raises:
        ValueError: there is none; says which it is that other programs call so, or lists all.
    """
    if isinstance(name, str) and name in SAMPLERS:
        return SAMPLERS[name]
    # A class that is two of them by its arguments is the one that takes none.
    rows = sorted(SAMPLERS.items(), key=lambda item: "," not in item[1].diffusers)
    others = {
        other.partition(",")[0].lower(): ours
        for ours, row in rows
        for other in (row.diffusers, row.a1111, ours)
    }
    other, karras, _ = str(name).lower().partition(" karras")
    if other and other in others:
        levels = ", on Karras's noise levels" if karras else ""
        raise ValueError(f"unknown sampler {name!r}; here it is {others[other]}{levels}")
    raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
