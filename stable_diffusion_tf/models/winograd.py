"""3x3 convolutions with 4/9 of the multiplications (Lavin and Gray 2016, arXiv:1509.09308).

Two by two results y, whose 3x3 kernel is g, are of a 4x4 patch d

    y = A [(G g G') * (B d B')] A'

`*` multiplies single values, so that over channels and patches it is 16 matrix products. A matrix
on both sides of another is its Kronecker product with itself, times the other's values in a row.
"""

import math

import numpy as np
from keras import ops

from stable_diffusion_tf.compile import differentiated_as, traced_once

A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2

# A value of x is in as many products as there are filters, one of the result in as many as there
# are channels, one of the kernel in as many as places. How few of them are worth A, B and G, as a
# third of their harmonic mean, was measured on a CPU.
FEWEST = 120
BLOCK = 2**25  # values of patches, or of their results, that are computed in one piece: 128 MB


def is_shorter(shape, kernel_shape):
    """Whether `convolve` takes an x and a kernel of these shapes, and less time than others do."""
    batch, height, width, channels = shape
    *sides, _, filters = kernel_shape
    if tuple(sides) != (3, 3) or height % 2 or width % 2:
        return False
    return 1 / filters + 1 / channels + 1 / (batch * height * width) <= 1 / FEWEST


def convolve_directly(x, kernel):
    return ops.conv(x, kernel, padding="same", data_format="channels_last")


@traced_once
@differentiated_as(convolve_directly)
def convolve(x, kernel):
    """x (B, H, W, C), H and W even, kernel (3, 3, C, F) -> its "same" convolution (B, H, W, F)."""
    batch, height, width, channels = x.shape
    filters = kernel.shape[-1]
    kernel = ops.matmul(twice(G, x.dtype), ops.reshape(kernel, (9, -1)))
    kernel = ops.reshape(kernel, (16, channels, filters))
    x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = np.arange(math.prod(x.shape[:3]), dtype="int32").reshape(x.shape[:3])
    x = ops.reshape(x, (-1, channels))
    inside = places[0, :4, :4].reshape(16, 1)
    rows = batch * height // 2
    most = max(1, BLOCK // (8 * width * max(channels, filters)))
    rows_at_once = max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)

    def block(first):  # places of patches -> (2, 2, rows of them, W / 2, F)
        patches = ops.take(x, inside + first, axis=0)  # (16, N, C)
        patches = ops.matmul(twice(B, x.dtype), ops.reshape(patches, (16, -1)))
        y = ops.matmul(ops.reshape(patches, (16, -1, channels)), kernel)
        y = ops.matmul(twice(A, x.dtype), ops.reshape(y, (16, -1)))
        return ops.reshape(y, (2, 2, rows_at_once, width // 2, filters))

    first = places[:, :-2:2, :-2:2].reshape(rows // rows_at_once, -1)
    y = ops.map(block, first) if len(first) > 1 else block(first[0])[None]
    return ops.reshape(ops.transpose(y, (0, 3, 1, 4, 2, 5)), (batch, height, width, filters))


def twice(matrix, dtype):
    return ops.convert_to_tensor(np.kron(matrix, matrix), dtype)
