"""Float32 on matrix units that multiply bfloat16: an array as a sum of three, and search and lookup built on that.

Everything here runs inside the kernels for TPUs and for GPUs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_BY_ROWS = (((1,), (1,)), ((), ()))


def bfloat16_parts(x: jax.Array) -> tuple[jax.Array, ...]:
    """Bfloat16 arrays, the largest first, whose sum in this order is x: three for float32, one for bfloat16.

    Exact as long as the last part is no denormal, that is down to 1e-31. Made from the bits: a pair of
    conversions XLA may leave out, and then nothing is left over for the second part.
    """
    if x.dtype == jnp.bfloat16:
        return (x,)
    parts, rest = [], x
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(rest, jnp.int32)
        nearest = jax.lax.bitcast_convert_type((bits + 0x8000) & -0x10000, jnp.float32)
        parts.append(nearest.astype(jnp.bfloat16))
        rest = rest - nearest
    return tuple(parts)


def inner_products(a_parts: Sequence[jax.Array], b_parts: Sequence[jax.Array]) -> jax.Array:
    """Products [N, K] of the rows of [N, D] and [K, D] in float32, both given by their parts.

    Small products come first; those of order 2^-24 are left out. Of two float32 arrays six are left, which is what
    `Precision.HIGHEST` means on a TPU.
    """
    pairs = [(i, j) for i in range(len(a_parts)) for j in range(len(b_parts)) if i + j < 3]
    products = (
        jax.lax.dot_general(a_parts[i], b_parts[j], _BY_ROWS, preferred_element_type=jnp.float32)
        for i, j in sorted(pairs, key=sum, reverse=True)
    )
    return functools.reduce(operator.add, products)


def lowest(distance_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest distance of each row and its index, of several the lowest: [N, 1] each; 0 if all are NaN."""
    least_N1 = jnp.min(distance_NK, axis=1, keepdims=True)
    index_NK = jax.lax.broadcasted_iota(jnp.int32, distance_NK.shape, 1)
    others_NK = jnp.where(distance_NK > least_N1, distance_NK.shape[1], index_NK)
    return least_N1, jnp.min(others_NK, axis=1, keepdims=True)


def rows(parts: Sequence[jax.Array], index_N1: jax.Array) -> jax.Array:
    """Rows [N, D] in float32 of an array [K, D] that is given by its parts; zeros where an index is none of 0..K-1.

    A product with the one-hot rows of the indices: as exact as the parts, at half the passes of a float32 product.
    """
    shape = (index_N1.shape[0], parts[0].shape[0])
    hot_NK = (jax.lax.broadcasted_iota(jnp.int32, shape, 1) == index_N1).astype(jnp.float32).astype(jnp.bfloat16)
    products = (jnp.dot(hot_NK, part, preferred_element_type=jnp.float32) for part in parts)
    return functools.reduce(operator.add, products)
