"""A decoder's adversary: learns to tell decoded pictures from real ones, the decoder to deceive it.

The distance to a picture is least for a blur where the decoder is not sure; a blur is told at once.
"""

import keras
from keras import layers, ops


class Discriminator(keras.Model):
    """pictures (B, H, W, 3) in [-1, 1] -> scores (B, h, w, 1), higher for patches that look real.

    A score is of the 22 x 22 pixels that three convolutions of stride 2 see, so it judges outlines
    and textures, not what is shown (Isola et al. 2017, arXiv:1611.07004, section 3.2.2).
    """

    def __init__(self, width: int = 64, name="discriminator"):
        x = images = keras.Input((None, None, 3), name="images")
        for level in range(3):
            x = layers.Conv2D(width << level, 4, strides=2, padding="same", name=f"conv_{level}")(x)
            if level:
                x = layers.GroupNormalization(16, name=f"norm_{level}")(x)
            x = layers.LeakyReLU(0.2)(x)
        super().__init__(images, layers.Conv2D(1, 1, name="conv_out")(x), name=name)


def adversary(discriminator: keras.Model, weight: float):
    """Returns `loss(images, decoded)`: what decoder and discriminator minimise at the same time.

    The hinge loss (Lim and Ye 2017, arXiv:1705.02894): the discriminator learns scores above 1 of
    `images` and below -1 of `decoded`, the decoder high ones of its own, times `weight`. Neither
    changes the other: the decoder's term sees constant weights, the discriminator's a constant
    picture. Both are trained by one optimizer.

    images, decoded: (B, H, W, 3) in [-1, 1].
    """

    def loss(images, decoded):
        weights = [ops.stop_gradient(v.value) for v in discriminator.trainable_variables]
        pleased, _ = discriminator.stateless_call(weights, [], decoded)
        of_real, of_drawn = discriminator(images), discriminator(ops.stop_gradient(decoded))
        told = ops.mean(ops.relu(1.0 - of_real)) + ops.mean(ops.relu(1.0 + of_drawn))
        return told - weight * ops.mean(pleased)

    return loss
