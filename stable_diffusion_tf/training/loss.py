"""What training minimises, as functions of a batch."""

from keras import ops

from stable_diffusion_tf.diffusion.denoiser import add_noise, predicted_x0, target
from stable_diffusion_tf.diffusion.schedule import Step

NORMS = {"l2": ops.square, "l1": ops.abs}
WHITE = {"l2": 4, "l1": 2}  # how many times the norm of white noise is that of its 2x2 means


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
        kl = 0.5 * (ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance)
        rebuilt = ops.cast(decoder(latents * decoder.config.scale), "float32")
        kl = ops.mean(ops.sum(kl, axis=(1, 2, 3)))
        return distance(rebuilt, images, edge_weight) + kl_weight * kl

    return loss


def denoised_loss(text_encoder, unet, decoder, prediction, edge_weight=1.0, adversary=None):
    """Returns `loss(latents, noise, timesteps, alpha, sigma, token_ids, images)`, for the decoder.

    What the network makes of noisy latents lacks what the noise hid. A decoder that has only seen
    an encoder's latents shows that as a blur; here it learns what picture they come from, by the
    distance of `autoencoder_loss`. What an `adversary(images, decoded)` has to say of it, as of
    `training.adversary`, is added.

    Arguments as of `diffusion_loss`'s; images (B, H, W, 3) in [-1, 1], those of the latents.
    """

    def loss(latents, noise, timesteps, alpha, sigma, token_ids, images):
        step = Step(timesteps, alpha, sigma)
        x = add_noise(latents, noise, step)
        predicted = ops.cast(unet([x, timesteps, text_encoder(token_ids)]), "float32")
        decoded = ops.cast(decoder(predicted_x0(x, predicted, step, prediction)), "float32")
        found = distance(decoded, images, edge_weight)
        return found if adversary is None else found + adversary(images, decoded)

    return loss


def distance(decoded, images, edge_weight):
    """L1 of pixels and, times `edge_weight`, of their differences."""
    error = decoded - images
    edges = sum(ops.mean(ops.abs(d)) for d in differences(error))
    return ops.mean(ops.abs(error)) + edge_weight * edges


def differences(images):
    """Differences of neighbouring pixels, downwards and to the right."""
    return images[:, 1:] - images[:, :-1], images[:, :, 1:] - images[:, :, :-1]


def diffusion_loss(text_encoder, unet, prediction, norm="l2", min_snr=None, scales=1):
    """Returns `loss(latents, noise, timesteps, alpha, sigma, token_ids)`.

    The denoising objective of DDPM (arXiv:2006.11239, eq. 14) conditioned on text as in latent
    diffusion (arXiv:2112.10752, eq. 3), the text encoder trained along: the distance between what
    the network predicts of the noisy latents and what it should.

    latents, noise (B, h, w, channels); timesteps (B,); alpha, sigma (B, 1, 1, 1);
    token_ids (B, N). `prediction` is "epsilon" or "v"; `norm` is "l2" or "l1"; `min_snr` is the
    gamma of `min_snr_weight`, without which all timesteps weigh alike. With `scales` above 1 it is
    the mean of the losses of single latents and of 2x2, 4x4, ... means, so weighed that white noise
    costs alike at each of so many scales: means are the colours of areas, and among all values few
    (after the multiscale loss of Hoogeboom et al. 2023, arXiv:2301.11093). ValueError, of the loss,
    for latents of fewer than `2**(scales - 1)` a side.
    """

    def error(difference):  # (B, h, w, channels) -> (B, 1, 1, 1)
        total = 0.0
        for scale in range(scales):
            if scale:
                difference = ops.average_pool(difference, 2, 2, data_format="channels_last")
            values = NORMS[norm](difference)
            total += WHITE[norm] ** scale * ops.mean(values, axis=(1, 2, 3), keepdims=True)
        return total / scales

    def loss(latents, noise, timesteps, alpha, sigma, token_ids):
        sides = latents.shape[1:3]
        if min(sides) < 2 ** (scales - 1):
            raise ValueError(f"latents of {sides} have no means at {scales} scales; take fewer")
        step = Step(timesteps, alpha, sigma)
        predicted = unet([add_noise(latents, noise, step), timesteps, text_encoder(token_ids)])
        wanted = target(latents, noise, step, prediction)
        weight = 1.0 if min_snr is None else min_snr_weight(alpha, sigma, prediction, min_snr)
        return ops.mean(weight * error(ops.cast(predicted, "float32") - wanted))

    return loss


def min_snr_weight(alpha, sigma, prediction, gamma):
    """Weight of a timestep's squared error under min-SNR: `min(SNR, gamma)` of that of x0.

    Nearly clean timesteps, which are easy and many, pull less (Hang et al. 2023, arXiv:2303.09556,
    section 3.4; gamma 5 there). With SNR = alpha**2 / sigma**2 it is `min(SNR, gamma) / SNR` for
    "epsilon" and `min(SNR, gamma) / (SNR + 1)` for "v", which is 0 where there is no signal: the
    last timestep of a zero-SNR schedule is then learnt from its neighbours only.

    alpha, sigma: same shape, alpha**2 + sigma**2 = 1 -> the weights, that shape.
    """
    signal, noise = ops.square(alpha), ops.square(sigma)
    if prediction == "v":
        return ops.minimum(signal, gamma * noise)
    return ops.minimum(1.0, gamma * ops.divide(noise, signal))
