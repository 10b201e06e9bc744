from itertools import pairwise


def ddpm(denoise, x, steps, noise, *, variance="large", temperature=1.0):
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2, equation 7).

    Each step draws from the posterior of the noise level after, given x and x0. Its `variance` is
    fixed: "large", beta, right for data as random as the noise, or "small", right for data that
    never vary (section 3.2). The last step adds none.
    """
    for i, (now, after) in enumerate(pairwise(steps)):
        x0 = denoise(x, now)
        decay = now.alpha / after.alpha  # of the signal, from after to now
        beta = 1 - decay**2
        shrink = (after.sigma / now.sigma) ** 2
        x = after.alpha * beta / now.sigma**2 * x0 + decay * shrink * x
        if after.sigma > 0:
            spread = (beta if variance == "large" else shrink * beta) ** 0.5
            x = x + temperature * spread * noise(i)
        yield x, x0
