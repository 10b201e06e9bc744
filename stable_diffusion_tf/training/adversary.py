"""A decoder's adversary: learns to tell decoded pictures from real ones, the decoder to deceive it.

The distance to a picture is least for a blur where the decoder is not sure; to an adversary a blur
is a mark by which to know it.
"""

import keras
from keras import layers, ops

from stable_diffusion_tf.models.base import building
from stable_diffusion_tf.models.layers import group_norm


@keras.saving.register_keras_serializable("stable_diffusion_tf")
class Discriminator(keras.Model):
    """images (B, H, W, 3) in [-1, 1] -> scores (B, h, w, 1), higher for patches that look real.

    Three convolutions of stride 2 see 22 x 22 pixels, so a score is of outlines and textures, not
    of what is shown (Isola et al. 2017, arXiv:1611.07004, section 3.2.2); the norms add statistics
    of the whole picture. The first has `width` channels, a multiple of 8; the others twice as many
    each.
    """

    def __init__(self, width: int = 64, dtype=None, name="discriminator"):
        x = images = keras.Input((None, None, 3), dtype="float32", name="images")
        with building(dtype):
            for level in range(3):
                x = conv(x, width << level, 4, 2, name=f"conv_{level}")
                if level:
                    x = group_norm(x, 16, f"norm_{level}")
                x = ops.leaky_relu(x)
            x = conv(x, 1, 1, name="conv_out")
            super().__init__(images, x, name=name)
        self.width = width

    def get_config(self):
        return {"width": self.width, "dtype": self.dtype_policy.name, "name": self.name}


def conv(x, width, kernel, strides=1, *, name):
    kind = {"padding": "same", "data_format": "channels_last", "name": name}
    return layers.Conv2D(width, kernel, strides, **kind)(x)


def adversary(discriminator: keras.Model, weight: float):
    """Returns `loss(images, decoded)`: what decoder and discriminator minimise at the same time.

    The hinge loss (Lim and Ye 2017, arXiv:1705.02894): the discriminator learns scores above 1 of
    `images` and below -1 of `decoded`; the decoder, times `weight`, high ones of its own. No term
    has a gradient by the other's weights; the decoder's is always 0, its gradient is not. One
    optimizer trains both, `discriminator.trainable_variables` too; if it clips by the global norm,
    large gradients of one make the other's smaller.

    images, decoded: (B, H, W, 3) in [-1, 1].
    """

    def mean(x):
        return ops.mean(ops.cast(x, "float32"))

    def loss(images, decoded):
        real_scores = discriminator(images)
        fake_scores = discriminator(ops.stop_gradient(decoded))
        discriminator_loss = mean(ops.relu(1.0 - real_scores)) + mean(ops.relu(1.0 + fake_scores))
        # Of equal scores: gradients by the discriminator's weights cancel, that by `decoded` stays.
        # (To stop those by the weights instead will not do: TensorFlow 2.21's graph optimizer then
        # lets the decoder's term read some weights after their update.)
        generator_loss = mean(fake_scores) - mean(discriminator(decoded))
        return discriminator_loss + weight * generator_loss

    return loss
