from itertools import pairwise

from stable_diffusion_tf.samplers.ddim import move

SIGNAL = 1e-3  # of alpha: with less, x is next to all noise


def heun(denoise, x, steps, noise):
    """Heun's method on the probability flow (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    Euler's step, then the mean of eps at both its ends: of second order for twice the work. The
    last step, to where there is no noise, stays Euler's; so does the first from where there is no
    signal, as the correction would magnify errors of eps hundredfold. `noise` is never drawn.
    """
    for now, after in pairwise(steps):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x, _ = move(x, x0, now, after)
        if after.sigma > 0 and now.alpha > SIGNAL:
            x0 = denoise(x, after)
            correction = (x - after.alpha * x0) / after.sigma - eps
            # alpha' (r' - r) / 2, with r = sigma / alpha
            x = x + (after.sigma - after.alpha * now.sigma / now.alpha) / 2 * correction
        yield x, x0
