from itertools import pairwise
from math import expm1

from stable_diffusion_tf.samplers.ddim import move
from stable_diffusion_tf.samplers.dpmpp import extrapolated, length


def unipc(denoise, x, steps, noise):
    """UniPC of second order (Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2).

    In x0, with B(h) = exp(-h) - 1. The predictor is DPM-Solver++(2M). Once x0 is known where that
    led, the corrector takes the same step again with that in view, before the next one starts.
    `noise` is never drawn.
    """
    past = []  # of the last two steps: the step, x0 and the corrected x
    for now, after in pairwise(steps):
        x0 = denoise(x, now)
        if past:
            start, _, x_start = past[-1]
            x, _ = move(x_start, _corrected(x0, now, past), start, now)
        past = [*past[-1:], (now, x0, x)]
        before = past[0][:2] if len(past) > 1 else None
        x, _ = move(x, extrapolated(x0, now, after, before), now, after)
        yield x, x0


def _corrected(x0, now, past):
    """Returns the x0 that is to lead from the last step of `past` to `now`, where it was `x0`."""
    start, x0_start, _ = past[-1]
    if len(past) == 1:
        return x0_start + (x0 - x0_start) / 2
    before, x0_before, _ = past[0]
    h = length(start, now)
    ratio = -length(before, start) / h
    # What both x0 weigh solves the system of theorem 3.1: its matrix is ((1, 1), (ratio, 1)).
    b1 = -1 / h - 1 / expm1(-h)
    b2 = -2 * b1 / h - 1 / expm1(-h)
    rho = (b1 - b2) / (1 - ratio)
    return x0_start + rho / ratio * (x0_before - x0_start) + (b1 - rho) * (x0 - x0_start)
