"""Inpainting: the latents under a mask are repainted, the others stay a given picture's."""

from collections.abc import Callable

from stable_diffusion_tf.diffusion.denoiser import add_noise
from stable_diffusion_tf.diffusion.schedule import Step

CLEAN = Step(timestep=0.0, alpha=1.0, sigma=0.0)


def repainting(sample: Callable, original, mask, eps) -> Callable:
    """Returns the sampler `sample` as one that changes latents only where `mask` is 1.

    Elsewhere the latents are, at every noise level after the first, the original ones with the
    noise of that level on them, and at the end, as in every x0, those without any (Avrahami et al.
    2022, arXiv:2206.02779, section 4.1). The first level is the caller's: the original noised to
    it, or noise alone.

    Args:
        sample: a sampler, its options bound. It must compute each latent from that latent alone, as
            all of `stable_diffusion_tf.samplers` do, and leave it to `denoise` to look at the
            others.
        original: the picture's latents, (B, h, w, c).
        mask: (B, h, w, 1), 1 to repaint and 0 to keep.
        eps: the unit normal noise on the original, shaped as it is, the same at all levels.
    """

    def repaint(denoise, x, steps, noise):
        first, start = steps[0], x

        def kept(step):
            return start if step == first else add_noise(original, eps, step)

        def blend(x, step):
            return mask * x + (1 - mask) * kept(step)

        # What `sample` makes of the latents outside the mask is never looked at.
        def denoise_blended(x, step):
            return denoise(blend(x, step), step)

        drawn = sample(denoise_blended, x, steps, noise)
        for (x, x0), after in zip(drawn, [*steps[1:-1], CLEAN], strict=True):
            yield blend(x, after), blend(x0, CLEAN)

    return repaint
