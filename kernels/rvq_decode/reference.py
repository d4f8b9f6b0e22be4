"""`rvq_decode` in plain JAX, on one device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mimo_jax.kernels.rvq_encode.reference import at_least_float32


def decode(codes_NR: jax.Array, codebooks: Sequence[jax.Array]) -> jax.Array:
    """Arguments as in `rvq_decode`, but for `codebooks`: one for each level of the codes."""
    total_ND = at_least_float32(codebooks[0])[codes_NR[:, 0]]
    for level, book in enumerate(codebooks[1:], start=1):
        total_ND = total_ND + at_least_float32(book)[codes_NR[:, level]]
    return total_ND


def rows_of(codes_NR: jax.Array, codebooks: Sequence[jax.Array]) -> jax.Array:
    """The rows int32 [N, R], all within the codebooks, that JAX takes when it is asked for the rows `codes_NR`."""
    codes_NR = codes_NR.astype(jnp.int32)
    sizes_R = jnp.array([book.shape[0] for book in codebooks], jnp.int32)
    return jnp.clip(jnp.where(codes_NR < 0, codes_NR + sizes_R, codes_NR), 0, sizes_R - 1)
