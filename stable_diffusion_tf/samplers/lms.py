from itertools import pairwise
from math import prod

from stable_diffusion_tf.samplers.ddim import move


def lms(denoise, x, steps, noise, *, order=4):
    """Linear multistep: Adams-Bashforth for uneven steps, on the probability flow.

    In z = x / alpha and r = sigma / alpha the flow is dz / dr = eps (Karras et al. 2022,
    arXiv:2206.00364, equation 1): a step integrates the polynomial through the last `order` values
    of eps (Hairer, Norsett and Wanner, Solving ODEs I, section III.5). What that adds to Euler's
    step, which has eps constant, is all that is written here. `noise` is never drawn.
    """
    ratios, slopes = [], []
    for now, after in pairwise(steps):
        x0 = denoise(x, now)
        ratios = [now.sigma / now.alpha, *ratios[: order - 1]]
        slopes = [(x - now.alpha * x0) / now.sigma, *slopes[: order - 1]]
        x, _ = move(x, x0, now, after)
        for k in range(1, len(slopes)):
            weight = _integral(ratios, k, after.sigma / after.alpha)
            x = x + after.alpha * weight * (slopes[k] - slopes[0])
        yield x, x0


def _integral(nodes, k, end):
    """Integrates Lagrange's k-th polynomial over `nodes` from the first node to `end`."""

    def polynomial(r):
        others = nodes[:k] + nodes[k + 1 :]
        return prod((r - other) / (nodes[k] - other) for other in others)

    # Gauss's two points are exact up to degree 3.
    middle, half = (end + nodes[0]) / 2, (end - nodes[0]) / 2
    return half * (polynomial(middle - half / 3**0.5) + polynomial(middle + half / 3**0.5))
