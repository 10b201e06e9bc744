"""What TensorFlow's oneDNN computes of pictures one by one, in half the time.

A channel's batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167) of one picture takes its
moments, and is an affine map of it, in float32 also where the picture is in bfloat16. A layer norm
is one operation. The names are those of `stable_diffusion_tf.compile`.
"""

import math
from functools import cache

import tensorflow as tf
from tensorflow.python.framework import kernels  # no public name tells what there is

# Types, and up to how many pictures this is faster for; each makes the graph larger.
PICTURES = {"float32": 1, "bfloat16": 2}
WORTH = 2**17  # numbers to standardize: the operation takes a tenth of a millisecond by itself
SUMMED = 2**17  # values in a row, at most: float32's sums of more are off by 1e-5


@tf.custom_gradient  # the operation's own leaves the moments out
def moments(x):
    _, count, *shape = x.shape
    parts = next(n for n in range(math.ceil(count / SUMMED), count + 1) if count % n == 0)
    channels = parts * math.prod(shape)  # each part of a picture has its own
    one, zero = tf.ones(channels), tf.zeros(channels)
    found = [
        batch_norm(picture, one, zero, mean=[], variance=[], is_training=True)
        for picture in tf.unstack(tf.reshape(x, (-1, 1, count // parts, 1, channels)))
    ]
    means = tf.reshape(tf.stack([y.batch_mean for y in found]), (-1, parts, *shape))
    variances = tf.reshape(tf.stack([y.batch_variance for y in found]), (-1, parts, *shape))
    variances *= 1 - parts / count  # it takes a picture for a sample
    mean = tf.reduce_mean(means, 1, keepdims=True)
    variance = tf.reduce_mean(variances + tf.square(means - mean), 1, keepdims=True)

    def gradient(of_mean, of_variance):
        slope = of_mean + 2 * (tf.cast(x, tf.float32) - mean) * of_variance
        return tf.cast(slope / count, x.dtype)

    return (mean, variance), gradient


def affine(x, scale, shift):
    batch, count, *shape = x.shape
    channels = math.prod(shape)
    pictures = tf.unstack(tf.reshape(x, (batch, 1, count, 1, channels)))
    scales, shifts = (tf.unstack(tf.reshape(y, (batch, channels))) for y in (scale, shift))
    one, zero = tf.ones(channels), tf.zeros(channels)
    found = [
        batch_norm(*each, mean=zero, variance=one, is_training=False).y
        for each in zip(pictures, scales, shifts, strict=True)
    ]
    return tf.reshape(tf.concat(found, 0), x.shape)


def batch_norm(x, scale, shift, **settings):
    """x (1, N, 1, C) -> the operation's outputs, by name."""
    return tf.raw_ops.FusedBatchNormV3(x=x, scale=scale, offset=shift, epsilon=0, **settings)


def can_standardize(x):
    return math.prod(x.shape) >= WORTH and has_layer_norm()


@cache
def has_layer_norm():
    return bool(kernels.get_registered_kernels_for_op("_MklLayerNorm").kernel)


def standardize(x, gamma, beta, epsilon):
    """By an operation that TensorFlow's optimizer puts into graphs; XLA and TFLite have none such.

    All that it takes is of one type; it computes in float32.
    """
    dtype = x.dtype if x.dtype == gamma.dtype == tf.bfloat16 else tf.float32
    rows = tf.reshape(tf.cast(x, dtype), (-1, x.shape[-1]))
    gamma, beta = (tf.cast(w, dtype) for w in (gamma, beta))
    kind = tf.compat.v1.AttrValue(type=dtype.as_datatype_enum)
    attributes = {"T": kind, "epsilon": tf.compat.v1.AttrValue(f=epsilon)}
    norm = tf.compat.v1.get_default_graph().create_op(
        "_MklLayerNorm", [rows, gamma, beta], [dtype], name="layer_norm", attrs=attributes
    )
    return tf.reshape(tf.cast(norm.outputs[0], x.dtype), x.shape)
