"""`rvq_encode` in plain JAX, on one device. Axes: N vectors, D width, K entries of a level, R levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Encoded(NamedTuple):
    """What `rvq_encode` hands out; the last two are None where they were not asked for."""

    codes_NR: jax.Array  # int32
    quantized_ND: jax.Array | None  # sum of the chosen entries, level by level
    residual_norms_NR: jax.Array | None  # squared norm (sum over D) of what is left after each level


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 if it is float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def squared_distances(x_ND: jax.Array, entries_KD: jax.Array) -> jax.Array:
    """Squared distances x^2 - 2 x e + e^2 of vectors and entries: [N, K]."""
    cross_NK = jnp.matmul(x_ND, entries_KD.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(x_ND**2, axis=1, keepdims=True) - 2.0 * cross_NK + jnp.sum(entries_KD**2, axis=1)


def nearest(x_ND: jax.Array, entries_KD: jax.Array) -> jax.Array:
    """Index of the nearest entry of each vector: int32 [N]; of several, the lowest."""
    return jnp.argmin(squared_distances(x_ND, entries_KD), axis=1).astype(jnp.int32)


def encode(x_ND: jax.Array, codebooks: Sequence[jax.Array], sums: bool) -> Encoded:
    """Arguments as in `rvq_encode`, but for `codebooks`: only those of the levels that are wanted."""
    residual_ND = at_least_float32(x_ND)
    codes, norms = [], []
    total_ND: jax.Array | None = None
    for entries_KD in map(at_least_float32, codebooks):
        code_N = nearest(residual_ND, entries_KD)
        chosen_ND = entries_KD[code_N]
        residual_ND = residual_ND - chosen_ND
        codes.append(code_N)
        if sums:
            total_ND = chosen_ND if total_ND is None else total_ND + chosen_ND
            norms.append(jnp.sum(residual_ND**2, axis=1))
    return Encoded(jnp.stack(codes, axis=1), total_ND, jnp.stack(norms, axis=1) if sums else None)
