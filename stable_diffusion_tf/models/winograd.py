"""3x3 convolutions with 4/9 of the multiplications (Lavin and Gray 2016, arXiv:1509.09308).

Two by two results y, whose 3x3 kernel is g, are of a 4x4 patch d

    y = A [(G g G') * (B d B')] A'

with the transposes of the paper's A and B. `*` multiplies single values, so that over channels and
patches it is 16 matrix products. A matrix on both sides of another is its Kronecker product with
itself, times the other's values in a row.
"""

import math

import numpy as np
from keras import ops

from stable_diffusion_tf.compile import differentiated_as, traced_once

A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2

# A, B and G are worth their time where what they make is used often: a value of x once a filter, of
# the result once a channel, of the kernel once a position. The bound on the sum of the reciprocals
# was measured on a CPU.
OFTEN = 1 / 120

# Values of patches, or of their results, that are computed in one piece: 128 MB. Of more, blocks
# are, of which TensorFlow has up to ten at once.
WHOLE, BLOCK = 2**25, 2**22


def is_shorter(shape, kernel_shape):
    """Whether `convolve` can take an x and a kernel of these shapes, and is the faster way to."""
    batch, height, width, channels = shape
    *sides, _, filters = kernel_shape
    if tuple(sides) != (3, 3) or height % 2 or width % 2:
        return False
    return 1 / filters + 1 / channels + 1 / (batch * height * width) <= OFTEN


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
    indices = np.arange(math.prod(x.shape[:3]), dtype="int32").reshape(x.shape[:3])
    x = ops.reshape(x, (-1, channels))
    patch = indices[0, :4, :4].reshape(16, 1)
    rows, values = batch * height // 2, 8 * width * max(channels, filters)  # of patches; in a row
    most = rows if rows * values <= WHOLE else max(1, BLOCK // values)
    count = max(n for n in range(1, most + 1) if rows % n == 0)

    def block(first):  # indices of where `count` rows of patches begin -> (count, 2, W / 2, 2, F)
        patches = ops.take(x, patch + first, axis=0)  # (16, count * W / 2, C)
        patches = ops.matmul(twice(B, x.dtype), ops.reshape(patches, (16, -1)))
        y = ops.matmul(ops.reshape(patches, (16, -1, channels)), kernel)
        y = ops.matmul(twice(A, x.dtype), ops.reshape(y, (16, -1)))
        return ops.transpose(ops.reshape(y, (2, 2, count, width // 2, filters)), (2, 0, 3, 1, 4))

    first = indices[:, :-2:2, :-2:2].reshape(rows // count, -1)
    y = block(first[0]) if len(first) == 1 else ops.map(block, first)
    return ops.reshape(y, (batch, height, width, filters))


def twice(matrix, dtype):
    return ops.convert_to_tensor(np.kron(matrix, matrix), dtype)
