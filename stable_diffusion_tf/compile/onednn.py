"""What TensorFlow's oneDNN computes of a single picture, in half the time.

A channel's batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167) of one picture takes its
moments, and is an affine map of it, in float32 also where the picture is in bfloat16. The names are
those of `stable_diffusion_tf.compile`.
"""

import math

import tensorflow as tf

SUMMED = 2**17  # values in a row, at most: float32's sums of more are off by 1e-5


@tf.custom_gradient  # the operation's own leaves the moments out
def moments(x):
    _, count, *shape = x.shape
    parts = next(n for n in range(math.ceil(count / SUMMED), count + 1) if count % n == 0)
    channels = parts * math.prod(shape)  # each part of the picture has its own
    split = tf.reshape(x, (1, 1, count // parts, channels))
    one, zero = tf.ones(channels), tf.zeros(channels)
    y = batch_norm(split, one, zero, mean=[], variance=[], is_training=True)
    means, variances = (tf.reshape(m, (1, parts, *shape)) for m in (y.batch_mean, y.batch_variance))
    variances *= 1 - parts / count  # it takes a picture for a sample
    mean = tf.reduce_mean(means, 1, keepdims=True)
    variance = tf.reduce_mean(variances + tf.square(means - mean), 1, keepdims=True)

    def gradient(of_mean, of_variance):
        slope = of_mean + 2 * (tf.cast(x, tf.float32) - mean) * of_variance
        return tf.cast(slope / count, x.dtype)

    return (mean, variance), gradient


def affine(x, scale, shift):
    one, zero = tf.ones(tf.size(scale)), tf.zeros(tf.size(scale))
    flat = tf.reshape(x, (1, 1, x.shape[1], -1))
    scale, shift = (tf.reshape(y, (-1,)) for y in (scale, shift))
    y = batch_norm(flat, scale, shift, mean=zero, variance=one, is_training=False).y
    return tf.reshape(y, x.shape)


def batch_norm(x, scale, shift, **settings):
    """x (1, 1, N, C) -> the operation's outputs, by name."""
    return tf.raw_ops.FusedBatchNormV3(x=x, scale=scale, offset=shift, epsilon=0, **settings)
