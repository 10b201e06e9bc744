import numpy as np

BLOCK = 16  # normals that torch makes at once


class TorchGenerator:
    """The numbers of PyTorch's generator on the CPU, `torch.Generator().manual_seed(seed)`.

    Mersenne Twister (Matsumoto and Nishimura 1998, "Mersenne Twister: a 623-dimensionally
    equidistributed uniform pseudorandom number generator"), whose words are PyTorch's to the bit.
    Normals are theirs to about 3e-6, as far as they vary between one CPU and another.
    """

    def __init__(self, seed: int):
        """Starts from the low 32 bits of `seed`, as PyTorch does."""
        # NumPy's oldest generator, which is frozen, has the seeding that the Twister came with.
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._left_over: float | None = None  # of a pair of which one was asked for

    def rand(self, *shape: int) -> np.ndarray:
        """Returns uniform numbers in [0, 1), float32: `torch.rand(shape, generator=...)`."""
        return self._uniform(int(np.prod(shape))).reshape(shape)

    def randn(self, *shape: int) -> np.ndarray:
        """Returns unit normal numbers, float32: `torch.randn(shape, generator=...)`."""
        count = int(np.prod(shape))
        normals = self._blocks(count) if count >= BLOCK else self._pairs(count)
        return normals.reshape(shape)

    def _blocks(self, count: int) -> np.ndarray:
        """In blocks; when they do not divide `count`, the last 16 are drawn anew."""
        uniform = self._uniform(count)
        normals = np.empty(count, np.float32)
        whole = count - count % BLOCK
        normals[:whole] = _box_muller(uniform[:whole])
        if whole < count:
            normals[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return normals

    def _pairs(self, count: int) -> np.ndarray:
        """One by one, in float64, each second one left over from the one before."""
        return np.array([self._one() for _ in range(count)], np.float32)

    def _one(self) -> float:
        if self._left_over is not None:
            normal, self._left_over = self._left_over, None
            return normal
        turn, u = (self._uniform64() for _ in range(2))
        radius = np.sqrt(-2 * np.log1p(-u))
        self._left_over = radius * np.sin(2 * np.pi * turn)
        return radius * np.cos(2 * np.pi * turn)

    def _uniform(self, count: int) -> np.ndarray:
        words = self._words.randint(2**32, size=count, dtype=np.uint32)
        bits = words & (2**24 - 1)  # as many as a float32 can hold
        return bits.astype(np.float32) * np.float32(2**-24)

    def _uniform64(self) -> float:
        high, low = self._words.randint(2**32, size=2, dtype=np.uint64).tolist()
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Normals from as many uniform numbers (Box and Muller 1958), block by block."""
    u, turn = np.split(uniform.reshape(-1, 2, BLOCK // 2), 2, axis=1)
    radius = np.sqrt(-2 * np.log(1 - u, dtype=np.float64))
    angle = np.float64(np.float32(2 * np.pi) * turn)  # rounded as theirs
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
