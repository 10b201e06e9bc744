"""Euler's method on the probability flow (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

In z = x / alpha = x0 + r eps with r = sigma / alpha, the flow is dz / dr = eps, and a step is
z + (r' - r) eps = x0 + r' eps. Times alpha', that is DDIM's alpha' x0 + sigma' eps: the two differ
only in the noise levels they visit. So does the ancestral form, whose steps go down to
sqrt(r'^2 - up^2) and add noise of up = r' sqrt(r^2 - r'^2) / r: times alpha', DDIM's at eta 1.
Without a division by alpha, both may start where there is no signal.
"""

from stable_diffusion_tf.samplers.ddim import ddim


def euler(denoise, x, steps, noise):
    """Euler's method: deterministic, `noise` is never drawn."""
    yield from ddim(denoise, x, steps, noise)


def euler_ancestral(denoise, x, steps, noise, *, temperature=1.0):
    """Euler's method with ancestral noise after each step, scaled by `temperature`."""
    yield from ddim(denoise, x, steps, noise, eta=1.0, temperature=temperature)
