"""Counter-based randomness: every draw of the data pipeline is a hash of what it belongs to.

So a draw depends on (seed, source, epoch, record, ...) and on nothing else: not on the order of reading, the number of
processes or a restart. The mixing function is SplitMix64's finaliser (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hash_ints(*values: int) -> int:
    """64-bit hash of a sequence of integers."""
    h = 0
    for value in values:
        h = ((h ^ (value & _MASK)) + _GOLDEN) & _MASK
        h = ((h ^ (h >> 30)) * _M1) & _MASK
        h = ((h ^ (h >> 27)) * _M2) & _MASK
        h ^= h >> 31
    return h


def hash_arrays(*values: int | np.ndarray) -> np.ndarray:
    """`hash_ints` on each element of broadcast integer arrays: uint64, same values."""
    h = np.zeros(np.broadcast_shapes(*(np.shape(v) for v in values)), np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            words = np.asarray(value & _MASK if isinstance(value, int) else value).astype(np.uint64)
            h = (h ^ words) + np.uint64(_GOLDEN)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(_M1)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(_M2)
            h = h ^ (h >> np.uint64(31))
    return h


def hash_text(text: str) -> int:
    """64-bit hash of a string."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def uniform(hashes: np.ndarray) -> np.ndarray:
    """Turns 64-bit hashes into float64 numbers in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Permutation:
    """A keyed bijection of 0..n-1, evaluated at any place without storing it.

    A balanced Feistel network over the smallest even number of bits that holds n, walked along its cycle until the
    value is below n (2 evaluations on average, 4 at worst). Chosen over a stored shuffle so that an epoch of any size
    costs no memory and any place of it is known at once.
    """

    _ROUNDS = 6

    def __init__(self, size: int, key: int):
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [hash_ints(key, r) for r in range(self._ROUNDS)]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Values at `places` (integers below `size`), int64 of the same shape."""
        x = self._network(np.asarray(places).astype(np.uint64))
        outside = x >= self.size
        while outside.any():
            x[outside] = self._network(x[outside])
            outside = x >= self.size
        return x.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = x >> bits, x & mask
        for key in self._keys:
            left, right = right, left ^ (hash_arrays(key, right) & mask)
        return (left << bits) | right
