"""The KL-regularised autoencoder of latent diffusion (arXiv:2112.10752, section 3.1)."""

import keras
from keras import layers, ops

from stable_diffusion_tf.config import AutoencoderConfig
from stable_diffusion_tf.models.base import Network, building
from stable_diffusion_tf.models.layers import (
    Convolution,
    DotProductAttention,
    conv,
    dense,
    group_norm,
    resnet,
    upsample,
)

EPSILON = 1e-6  # of every norm here


class Encoder(Network):
    """images (B, H, W, 3) in [-1, 1] -> (B, h, w, 2 * channels): mean and log-variance, unscaled.

    H and W are multiples of `config.factor`.
    """

    Config = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, dtype=None, name="image_encoder"):
        images = keras.Input((None, None, 3), dtype="float32", name="images")
        last = len(config.widths) - 1
        moments = 2 * config.latent_channels
        with building(dtype):
            x = conv(images, config.widths[0], "encoder.conv_in")
            for level, width in enumerate(config.widths):
                block = f"encoder.down_blocks.{level}"
                for i in range(config.resnets):
                    x = resnet(x, width, config.groups, f"{block}.resnets.{i}", epsilon=EPSILON)
                if level != last:
                    x = downsample(x, f"{block}.downsamplers.0")
            x = middle(x, config, "encoder.mid_block")
            x = ops.silu(group_norm(x, config.groups, "encoder.conv_norm_out", EPSILON))
            x = conv(x, moments, "encoder.conv_out")
            x = conv(x, moments, "quant_conv", kernel=1)
            super().__init__(images, x, config, name)


class Decoder(Network):
    """latents (B, h, w, channels), multiplied by `config.scale` -> images (B, H, W, 3) in [-1, 1].

    The division by the scale is inside. Values may overshoot [-1, 1] a little; nothing is clipped.
    """

    Config = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, dtype=None, name="image_decoder"):
        latents = keras.Input((None, None, config.latent_channels), dtype="float32", name="latents")
        with building(dtype):
            x = latents / config.scale
            x = conv(x, config.latent_channels, "post_quant_conv", kernel=1)
            x = conv(x, config.widths[-1], "decoder.conv_in")
            x = middle(x, config, "decoder.mid_block")
            for level, width in enumerate(reversed(config.widths)):
                block = f"decoder.up_blocks.{level}"
                for i in range(config.resnets + 1):
                    x = resnet(x, width, config.groups, f"{block}.resnets.{i}", epsilon=EPSILON)
                if level != len(config.widths) - 1:
                    x = upsample(x, f"{block}.upsamplers.0")
            x = ops.silu(group_norm(x, config.groups, "decoder.conv_norm_out", EPSILON))
            x = conv(x, 3, "decoder.conv_out")
            super().__init__(latents, x, config, name)


def downsample(x, name):
    """Half the size: pads one pixel below and on the right only, unlike the UNet."""
    x_padded = layers.ZeroPadding2D(((0, 1), (0, 1)), data_format="channels_last")(x)
    return Convolution(x.shape[-1], 3, strides=2, name=f"{name}.conv")(x_padded)


def middle(x, config, name):
    width = config.widths[-1]
    x = resnet(x, width, config.groups, f"{name}.resnets.0", epsilon=EPSILON)
    h = group_norm(x, config.groups, f"{name}.attentions.0.group_norm", EPSILON)
    q, k, v = (dense(h, width, f"{name}.attentions.0.to_{part}") for part in "qkv")
    x = x + dense(DotProductAttention(heads=1)(q, k, v), width, f"{name}.attentions.0.to_out.0")
    return resnet(x, width, config.groups, f"{name}.resnets.1", epsilon=EPSILON)
