"""What training minimises, as functions of a batch."""

from keras import ops

NORMS = {"l2": ops.square, "l1": ops.abs}


def autoencoder_loss(encoder, decoder, kl_weight=1e-6, edge_weight=1.0):
    """Returns `loss(images, noise)`: L1 of pixels and of their differences, and a light KL term.

    The KL-regularised autoencoder of arXiv:2112.10752 (section 3.1); L1 of the differences between
    neighbouring pixels keeps edges sharp where that paper has a perceptual and an adversarial loss.

    images (B, H, W, 3) in [-1, 1]; noise (B, h, w, channels), unit normal.
    """

    def loss(images, noise):
        mean, log_variance = ops.split(ops.cast(encoder(images), "float32"), 2, axis=-1)
        log_variance = ops.clip(log_variance, -30.0, 20.0)
        latents = mean + ops.exp(0.5 * log_variance) * noise
        decoded = ops.cast(decoder(latents * decoder.config.scale), "float32")
        kl = 0.5 * (ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance)
        pixels = ops.mean(ops.abs(decoded - images))
        edges = sum(ops.mean(ops.abs(d)) for d in differences(decoded - images))
        return pixels + edge_weight * edges + kl_weight * ops.mean(ops.sum(kl, axis=(1, 2, 3)))

    return loss


def differences(images):
    """Differences of neighbouring pixels, downwards and to the right."""
    return images[:, 1:] - images[:, :-1], images[:, :, 1:] - images[:, :, :-1]


def diffusion_loss(text_encoder, unet, norm="l2"):
    """Returns `loss(latents, noise, alpha, sigma, timesteps, token_ids, target)`.

    The denoising objective of DDPM (arXiv:2006.11239, eq. 14) conditioned on text (arXiv:2112.10752,
    eq. 3), the text encoder trained along: the distance of the network's prediction at
    `alpha * latents + sigma * noise` from `target`, the noise or v (arXiv:2202.00512).

    latents, noise, target (B, h, w, channels); alpha, sigma (B, 1, 1, 1); timesteps (B,);
    token_ids (B, N). `norm` is "l2" or "l1".
    """
    distance = NORMS[norm]

    def loss(latents, noise, alpha, sigma, timesteps, token_ids, target):
        noisy = alpha * latents + sigma * noise
        predicted = unet([noisy, timesteps, text_encoder(token_ids)])
        return ops.mean(distance(ops.cast(predicted, "float32") - target))

    return loss
