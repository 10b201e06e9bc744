from itertools import pairwise

from stable_diffusion_tf.samplers.ddim import move


def heun(denoise, x, steps, noise):
    """Heun's method on the probability flow (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    Euler's step, then the mean of eps at both its ends: of second order for twice the work. The
    last step, to where there is no noise, stays Euler's; so does one over which the signal grows
    threefold or more. `noise` is never drawn.
    """
    for now, after in pairwise(steps):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x, _ = move(x, x0, now, after)
        # alpha' (r' - r) / 2, with r = sigma / alpha
        weight = (after.sigma - after.alpha * now.sigma / now.alpha) / 2
        # Beyond -1 it magnifies by how much eps differ, errors too: from no signal, hundredfold.
        if after.sigma > 0 and weight > -1:
            x0 = denoise(x, after)
            x = x + weight * ((x - after.alpha * x0) / after.sigma - eps)
        yield x, x0
