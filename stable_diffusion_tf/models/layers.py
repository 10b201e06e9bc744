"""The parts the networks share, as functions on symbolic tensors.

Each takes the full checkpoint name of the weights it makes, so that a variable's path *is* its
published name: `down_blocks.0.resnets.1.conv1/kernel`. Activations are channels-last; attention
works on (B, H, W, C) and (B, N, C) alike and flattens positions only inside the product.
"""

import math

import keras
import numpy as np
from keras import layers, ops

from stable_diffusion_tf.compile import (
    affine,
    fused,
    moments,
    softmax,
    standardize,
    traced_once,
    uses_onednn,
)
from stable_diffusion_tf.models import winograd

EPSILON = 1e-5  # every norm but the autoencoder's and the spatial transformer's (Keras: 1e-3)

# Attention weights that are computed in one piece: 8 MB, which caches still hold. JAX has fused
# attention of its own where it counts.
BLOCK = 2**21 if keras.backend.backend() == "tensorflow" else math.inf


def conv(x, width, name, kernel=3):
    return Convolution(width, kernel, padding="same", name=name)(x)


class Convolution(layers.Conv2D):
    """Conv2D of an odd kernel, "same" of stride 1 or "valid" of more, in a CPU's fastest form."""

    def __init__(self, *args, data_format="channels_last", **kwargs):
        super().__init__(*args, data_format=data_format, **kwargs)
        padding = "same" if self.strides == (1, 1) else "valid"
        odd = all(size % 2 for size in self.kernel_size)
        if self.padding != padding or not odd or self.dilation_rate != (1, 1) or self.groups > 1:
            raise ValueError("what is neither 'same' of stride 1 nor 'valid' of more is a Conv2D")

    def call(self, x):
        batch, height, width, _ = x.shape
        if None not in (batch, height, width):
            same = self.padding == "same"
            onednn = self.compute_dtype == "float32" and uses_onednn()
            if same and onednn and winograd.is_shorter(x.shape, self.kernel.shape):
                return ops.add(winograd.convolve(x, ops.cast(self.kernel, x.dtype)), self.bias)
            # Of one picture, in float32, TensorFlow gives oneDNN the kernel as it is, for which it
            # has no fast loop; of several, it lets it have the kernel as it likes.
            slow = onednn and batch == 1
            few = batch * height * width <= self.filters
            if same and (few or (slow and self.kernel_size == (1, 1))):
                return as_product(x, *(ops.cast(w, x.dtype) for w in (self.kernel, self.bias)))
            if slow:
                return self.in_halves(x)
        return ops.add(self.convolution_op(x, self.kernel), self.bias)

    def in_halves(self, x):
        """The upper and the lower half of one picture as a batch of two."""
        _, height, width, _ = self.compute_output_shape(x.shape)
        half = (height + 1) // 2
        start = half * self.strides[0]  # where the lower half begins
        size = start - self.strides[0] + self.kernel_size[0]  # what each of them reads
        (top, bottom), columns = self.margins()[1:3]
        bottom = max(bottom, start + size - top - x.shape[1])  # of an odd number, one more
        x = ops.pad(x, ((0, 0), (top, bottom), columns, (0, 0)))[0]
        x = ops.stack([x[:size], x[start : start + size]])
        x = ops.conv(x, self.kernel, self.strides, "valid", self.data_format)
        x = ops.add(x, self.bias)
        return ops.reshape(x, (1, 2 * half, width, self.filters))[:, :height]

    def margins(self):
        """What its padding adds to each axis of a batch."""
        around = [(size // 2 if self.padding == "same" else 0,) * 2 for size in self.kernel_size]
        return ((0, 0), *around, (0, 0))


@traced_once
def as_product(x, kernel, bias):
    """A "same" convolution as one matrix product.

    It is up to 4 times as fast where the kernel outweighs all patches of x.
    """
    _, height, width, _ = x.shape
    *sides, _, filters = kernel.shape
    if math.prod(sides) > 1:  # else a patch is one position
        x = ops.pad(x, ((0, 0), *((side // 2,) * 2 for side in sides), (0, 0)))
        x = [x[:, i : i + height, j : j + width] for i, j in np.ndindex(*sides)]
        x = ops.concatenate(x, axis=-1)
    # Of rows, TensorFlow adds the bias within the product.
    y = ops.matmul(ops.reshape(x, (-1, x.shape[-1])), ops.reshape(kernel, (-1, filters)))
    return ops.reshape(ops.add(y, bias), (-1, height, width, filters))


def dense(x, width, name, bias=True):
    return layers.Dense(width, use_bias=bias, name=name)(x)


def group_norm(x, groups, name, epsilon=EPSILON):
    return GroupNormalization(groups, epsilon=epsilon, name=name)(x)


class GroupNormalization(layers.GroupNormalization):
    """Keras's (Wu and He 2018, arXiv:1803.08494), several times as fast on a CPU."""

    def call(self, x):
        gamma, beta = (ops.cast(w, "float32") for w in (self.gamma, self.beta))
        return normalize_groups(x, gamma, beta, self.groups, self.epsilon)


@traced_once
def normalize_groups(x, gamma, beta, groups, epsilon):
    """x (B, ..., C), gamma and beta (C,) in float32 -> like x.

    Keras reduces over pixels and a group's channels at once, for which TensorFlow has no fast loop.
    Here it is over pixels; what remains is a mean and a variance a channel to put together.
    """
    shape = ops.shape(x)
    x = ops.reshape(x, (shape[0], -1, groups, shape[-1] // groups))
    means, variances = moments(x)
    mean = ops.mean(means, axis=-1, keepdims=True)
    variance = ops.mean(variances + ops.square(means - mean), axis=-1, keepdims=True)
    gamma, beta = (ops.reshape(w, x.shape[2:]) for w in (gamma, beta))
    scale = gamma * ops.rsqrt(variance + epsilon)
    return ops.reshape(affine(x, scale, beta - mean * scale), shape)


def layer_norm(x, name):
    return LayerNormalization(epsilon=EPSILON, name=name)(x)


class LayerNormalization(layers.LayerNormalization):
    """Keras's (Ba et al. 2016, arXiv:1607.06450) over channels, in fewer operations and passes."""

    def call(self, x):
        return standardize(x, self.gamma, self.beta, self.epsilon)


def quick_gelu(x):
    """CLIP's approximation of GELU."""
    return x * ops.sigmoid(1.702 * x)


def gelu(x):
    """Exact (erf) GELU; tanh's approximation is off by 1e-4."""
    return 0.5 * x * (1 + ops.erf(x * 0.5**0.5))  # Keras's is of erfc, which is slower


class GatedGELU(layers.Dense):
    """x -> h * gelu(gate), half of the `units` each (Shazeer 2020, arXiv:2002.05202)."""

    def call(self, x):
        return gated(ops.matmul(x, self.kernel), ops.cast(self.bias, "float32"))

    def compute_output_shape(self, shape):
        return *shape[:-1], self.units // 2


@fused
def gated(x, bias):
    """In float32, as `bias` is, rounded once to x's type."""
    h, gate = ops.split(ops.cast(x, "float32") + bias, 2, axis=-1)
    return ops.cast(h * gelu(gate), x.dtype)


class DotProductAttention(layers.Layer):
    """softmax(q k^T / sqrt(d)) v over `heads` heads (Vaswani et al. 2017, arXiv:1706.03762).

    q (B, ..., C), k and v (B, ..., C) -> like q. Softmax runs in float32; under float16 so do
    the products, which overflow it in Stable Diffusion 2.1. Where a picture's heads have more than
    `BLOCK` weights together, each is computed by itself, in blocks of queries that have no more:
    every query's result is exact.
    """

    def __init__(self, heads, causal=False, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads
        self.causal = causal

    def call(self, q, k, v):
        return attend(q, k, v, self.heads, self.causal, BLOCK)

    def compute_output_shape(self, q_shape, k_shape, v_shape):
        return q_shape


@traced_once
def attend(q, k, v, heads, causal, most):
    """`DotProductAttention`'s arithmetic; `most` is its bound on the weights in one piece."""

    def split(x):  # (B, ..., C) -> (B, N, heads, C / heads)
        x = ops.cast(x, "float32") if dtype == "float16" else x
        return ops.reshape(x, (ops.shape(x)[0], -1, heads, x.shape[-1] // heads))

    shape, dtype = ops.shape(q), q.dtype
    q, k, v = split(q), split(k), split(v)
    q = q * q.shape[-1] ** -0.5  # here, not on their products, of which there are more
    sizes = q.shape[1], k.shape[1]
    if None not in sizes and math.prod(sizes) * heads > most and not causal:
        x = attend_in_blocks(q, k, v, most)
    else:
        x = ops.dot_product_attention(q, k, v, scale=1.0, is_causal=causal)
    return ops.cast(ops.reshape(x, shape), dtype)


def attend_in_blocks(q, k, v, most):
    """Scaled q, k and v (B, N, heads, d) -> like q, `most` weights at a time."""
    batch, count, heads, width = ops.shape(q)
    blocks = min(math.ceil(count * k.shape[1] / most), count)
    rows = math.ceil(count / blocks)
    q = ops.pad(q, ((0, 0), (0, blocks * rows - count), (0, 0), (0, 0)))
    q = ops.reshape(ops.transpose(q, (0, 2, 1, 3)), (-1, rows, width))
    k = ops.reshape(ops.transpose(k, (0, 2, 3, 1)), (batch * heads, width, -1))
    v = ops.reshape(ops.transpose(v, (0, 2, 1, 3)), (batch * heads, -1, width))

    def block(i):
        return ops.matmul(softmax(ops.matmul(q[i], k[i // blocks])), v[i // blocks])

    out = ops.map(block, ops.arange(batch * heads * blocks))
    out = ops.reshape(out, (batch, heads, blocks * rows, width))
    return ops.transpose(out, (0, 2, 1, 3))[:, :count]


def resnet(x, width, groups, name, temb=None, epsilon=EPSILON):
    """Residual block; `temb` (B, D) is the UNet's activated time embedding."""
    h = ops.silu(group_norm(x, groups, f"{name}.norm1", epsilon))
    h = conv(h, width, f"{name}.conv1")
    if temb is not None:
        h = h + ops.reshape(dense(temb, width, f"{name}.time_emb_proj"), (-1, 1, 1, width))
    h = ops.silu(group_norm(h, groups, f"{name}.norm2", epsilon))
    h = conv(h, width, f"{name}.conv2")
    if x.shape[-1] != width:
        x = conv(x, width, f"{name}.conv_shortcut", kernel=1)
    return x + h


def upsample(x, name, like=None):
    """Twice the size by nearest neighbour, cut to that of `like`, then a convolution."""
    width = x.shape[-1]
    x = NearestUpsampling()(x)
    if like is not None:
        x = CropLike()(x, like)
    return conv(x, width, f"{name}.conv")


class NearestUpsampling(layers.Layer):
    """(B, H, W, C) -> (B, 2H, 2W, C): every position four times."""

    def call(self, x):
        batch, height, width, channels = ops.shape(x)
        x = ops.reshape(x, (batch, height, 1, width, channels))
        return ops.reshape(ops.tile(x, (1, 1, 2, 1, 2)), (batch, 2 * height, 2 * width, channels))

    def compute_output_shape(self, shape):
        batch, height, width, channels = shape
        return batch, height and 2 * height, width and 2 * width, channels


class CropLike(layers.Layer):
    """Cuts x to the height and width of `like`, for sides that halving rounded up."""

    def call(self, x, like):
        return x[:, : ops.shape(like)[1], : ops.shape(like)[2]]

    def compute_output_shape(self, x_shape, like_shape):
        return (*like_shape[:3], x_shape[-1])
