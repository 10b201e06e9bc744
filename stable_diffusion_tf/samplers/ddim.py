from itertools import pairwise


def ddim(denoise, x, steps, noise, *, eta=0.0, temperature=1.0):
    """Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502, equations 12, 16).

    `eta` in [0, 1] goes from the deterministic sampler to DDPM's ancestral one; `temperature`
    scales the noise that it adds.
    """
    for i, (now, after) in enumerate(pairwise(steps)):
        x0 = denoise(x, now)
        x, spread = move(x, x0, now, getattr(now, "below", after), eta)
        if spread > 0:
            x = x + temperature * spread * noise(i)
        yield x, x0


def move(x, x0, now, after, eta=0.0):
    """Returns where x at `now` gets to at `after`, if x0 is clean, and the noise still to add."""
    eps = (x - now.alpha * x0) / now.sigma
    spread = eta * after.sigma / now.sigma * (1 - (now.alpha / after.alpha) ** 2) ** 0.5
    return after.alpha * x0 + (after.sigma**2 - spread**2) ** 0.5 * eps, spread
