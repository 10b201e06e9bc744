"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): multistep, of second order, in x0.

With lambda = log(alpha / sigma), the first-order step is DDIM's. The second-order one (algorithm 2)
is DDIM's too, from an x0 that is extrapolated to the middle of the step.
"""

from itertools import pairwise
from math import log

from stable_diffusion_tf.samplers.ddim import move


def dpmpp_2m(denoise, x, steps, noise):
    """DPM-Solver++(2M): deterministic, `noise` is never drawn."""
    yield from dpmpp_2m_sde(denoise, x, steps, noise, eta=0.0)


def dpmpp_2m_sde(denoise, x, steps, noise, *, eta=1.0, temperature=1.0):
    """SDE-DPM-Solver++(2M): the same with fresh noise after each step, scaled by `temperature`."""
    last = None
    for i, (now, after) in enumerate(pairwise(steps)):
        x0 = denoise(x, now)
        x, spread = move(x, extrapolated(x0, now, after, last), now, after, eta)
        if spread > 0:
            x = x + temperature * spread * noise(i)
        last = now, x0
        yield x, x0


def extrapolated(x0, now, after, last):
    """Returns x0 in the middle of the step from `now` to `after`, linear in lambda.

    `last` is the step before with its x0, or None. The step to where there is no noise, which is
    infinitely long in lambda, has x0 as it is.
    """
    if last is None or after.sigma == 0:
        return x0
    before, x0_before = last
    return x0 + length(now, after) / length(before, now) / 2 * (x0 - x0_before)


def length(start, end):
    """Returns h, by how much lambda grows from one step to another."""
    return log(end.alpha / end.sigma) - log(start.alpha / start.sigma)
