"""What any backend computes, in `keras.ops`; the engine `openvino` knows group norms by it.

The names are those of `stable_diffusion_tf.compile`.
"""

from keras import ops


def softmax(x):
    return ops.cast(ops.softmax(ops.cast(x, "float32")), x.dtype)


def moments(x):
    return ops.moments(ops.cast(x, "float32"), axes=[1], keepdims=True)


def affine(x, scale, shift):
    return ops.cast(ops.cast(x, "float32") * scale + shift, x.dtype)


def standardize(x, gamma, beta, epsilon):
    dtype = x.dtype
    x, gamma, beta = (ops.cast(each, "float32") for each in (x, gamma, beta))
    x = x - ops.mean(x, axis=-1, keepdims=True)
    variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
    return ops.cast(x * ops.rsqrt(variance + epsilon) * gamma + beta, dtype)
