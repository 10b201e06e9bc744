"""The cross-attention UNet of latent diffusion (Rombach et al. 2022, arXiv:2112.10752)."""

import math

import keras
from keras import layers, ops

from stable_diffusion_tf.config import UNetConfig
from stable_diffusion_tf.models.base import Network, building
from stable_diffusion_tf.models.layers import (
    Convolution,
    DotProductAttention,
    GatedGELU,
    conv,
    dense,
    group_norm,
    layer_norm,
    resnet,
    upsample,
)


class UNet(Network):
    """[latents (B, h, w, in), timesteps (B,), context (n B, N, width)] -> (n B, h, w, out).

    Predicts the noise (or v) in `latents` at `timesteps`, integer or fractional, given the text
    encoder's states. Any height and width: upsampling follows the size of the skip.

    Of n contexts for each of the latents (all the first ones, then all the second ones, …), as in
    guidance, the predictions are as of n times the latents and timesteps; but up to where a context
    is first read, they are computed once.

    Args:
        config: the sizes; see `stable_diffusion_tf.config` for the published ones.
        dtype: Keras dtype policy of the layers. Timesteps are embedded in float32 whatever it is.
    """

    Config = UNetConfig

    def __init__(self, config: UNetConfig, dtype=None, name="diffusion_model"):
        latents = keras.Input((None, None, config.in_channels), dtype="float32", name="latents")
        timesteps = keras.Input((), dtype="float32", name="timesteps")
        context = keras.Input((None, config.context_width), dtype="float32", name="context")
        levels = range(len(config.widths))
        last = levels[-1]
        shared = True  # by all contexts, as none has been read

        def block(x, width, name, i, level, attend):
            nonlocal temb, shared
            x = resnet(x, width, config.groups, f"{name}.resnets.{i}", temb)
            if attend:
                name = f"{name}.attentions.{i}"
                h = attend_to_itself(x, config, level, name)
                if shared:
                    x, h, temb, *skips[:] = (PerContext()(y, context) for y in (x, h, temb, *skips))
                    shared = False
                x = attend_to_context(x, h, context, config, level, name)
            return x

        with building(dtype):
            temb = Sinusoids(config.widths[0], dtype="float32")(timesteps)
            temb = dense(temb, 4 * config.widths[0], "time_embedding.linear_1")
            temb = dense(ops.silu(temb), 4 * config.widths[0], "time_embedding.linear_2")
            temb = ops.silu(temb)

            x = conv(latents, config.widths[0], "conv_in")
            skips = [x]
            for level in levels:
                width, prefix = config.widths[level], f"down_blocks.{level}"
                for i in range(config.resnets):
                    x = block(x, width, prefix, i, level, config.attention[level])
                    skips.append(x)
                if level != last:
                    x = downsample(x, f"{prefix}.downsamplers.0")
                    skips.append(x)

            width = config.widths[last]
            x = block(x, width, "mid_block", 0, last, attend=True)
            x = resnet(x, width, config.groups, "mid_block.resnets.1", temb)

            for level in reversed(levels):
                width, prefix = config.widths[level], f"up_blocks.{last - level}"
                for i in range(config.resnets + 1):
                    deep = x  # in the end, what the last of these blocks reads
                    x = ops.concatenate([deep, skips.pop()], axis=-1)
                    x = block(x, width, prefix, i, level, config.attention[level])
                if level != 0:
                    x = upsample(x, f"{prefix}.upsamplers.0", like=skips[-1])

            x = ops.silu(group_norm(x, config.groups, "conv_norm_out"))
            x = conv(x, config.out_channels, "conv_out")
            super().__init__([latents, timesteps, context], x, config, name)
        self.deep = deep

    def keeping(self) -> keras.Model:
        """The same network, its layers and weights, giving [prediction, deep features].

        The features (n B, h, w, channels) are all that its last block reads of the blocks before.
        They change slowly from step to step (DeepCache: Ma et al. 2023, arXiv:2312.00858).
        """
        return self.derived(self.inputs, [self.outputs[0], self.deep])

    def reusing(self) -> keras.Model:
        """The shallow rest of it: [latents, timesteps, context, deep features] -> prediction.

        Of these layers and weights, it runs the first convolution, the last block and what follows:
        8% of Stable Diffusion 1.x's multiplications at 512x512.
        """
        return self.derived([*self.inputs, self.deep], self.outputs[0])


class Sinusoids(layers.Layer):
    """timesteps (B,) -> (B, width): cosines, then sines, of width / 2 frequencies in float32."""

    def __init__(self, width, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.width = width

    def call(self, timesteps):
        half = self.width // 2
        frequencies = ops.exp(-math.log(10000) * ops.arange(half, dtype="float32") / half)
        angles = timesteps[:, None] * frequencies
        return ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)


def downsample(x, name):
    """Half the size, rounded up: pads one pixel on every side."""
    x_padded = layers.ZeroPadding2D(1, data_format="channels_last")(x)
    return Convolution(x.shape[-1], 3, strides=2, name=f"{name}.conv")(x_padded)


class PerContext(layers.Layer):
    """x (B, …), context (n B, N, width) -> (n B, …): all of x, n times."""

    def call(self, x, context):
        shape = ops.shape(x)
        n = ops.shape(context)[0] // shape[0]
        return ops.reshape(ops.broadcast_to(x, (n, *shape)), (-1, *shape[1:]))

    def compute_output_shape(self, x_shape, context_shape):
        return context_shape[0], *x_shape[1:]


def attend_to_itself(x, config, level, name):
    """The first part of a spatial transformer: x and self-attention at every position."""
    block = f"{name}.transformer_blocks.0"
    h = group_norm(x, config.groups, f"{name}.norm", epsilon=1e-6)
    h = project(h, config, f"{name}.proj_in")
    normed = layer_norm(h, f"{block}.norm1")
    return h + attention(normed, normed, config.heads[level], f"{block}.attn1")


def attend_to_context(x, h, context, config, level, name):
    """The rest of it: x and, of the first part's h, cross-attention and a gated MLP."""
    block = f"{name}.transformer_blocks.0"
    normed = layer_norm(h, f"{block}.norm2")
    h = h + attention(normed, context, config.heads[level], f"{block}.attn2")
    h = h + geglu(layer_norm(h, f"{block}.norm3"), f"{block}.ff.net")
    return x + project(h, config, f"{name}.proj_out")


def project(x, config, name):
    """Dense or a convolution of 1x1: the same arithmetic; checkpoints store one or the other."""
    width = x.shape[-1]
    return dense(x, width, name) if config.linear_projection else conv(x, width, name, kernel=1)


def attention(x, context, heads, name):
    width = x.shape[-1]
    q = dense(x, width, f"{name}.to_q", bias=False)
    k = dense(context, width, f"{name}.to_k", bias=False)
    v = dense(context, width, f"{name}.to_v", bias=False)
    return dense(DotProductAttention(heads)(q, k, v), width, f"{name}.to_out.0")


def geglu(x, name):
    """Feed-forward gated by GELU (Shazeer 2020, arXiv:2002.05202)."""
    width = x.shape[-1]
    h = GatedGELU(8 * width, name=f"{name}.0.proj")(x)
    return dense(h, width, f"{name}.2")
