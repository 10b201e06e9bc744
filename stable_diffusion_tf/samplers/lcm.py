from itertools import pairwise


def lcm(denoise, x, steps, noise, *, temperature=1.0):
    """Multistep sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378).

    The clean latents of each step (algorithm 3), noised again to the level of the next, by noise
    that `temperature` scales. The consistency function is c_skip x + c_out x0 (section 4), with
    the published model's data deviation of 0.5 and timesteps scaled by 10.
    """
    for i, (now, after) in enumerate(pairwise(steps)):
        time = 10 * now.timestep
        skip, out = 0.5**2 / (time**2 + 0.5**2), time / (time**2 + 0.5**2) ** 0.5
        clean = skip * x + out * denoise(x, now)
        x = after.alpha * clean
        if after.sigma > 0:
            x = x + temperature * after.sigma * noise(i)
        yield x, clean
