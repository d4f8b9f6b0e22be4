"""Residual nearest-neighbour search through all levels of a codebook, with the residual kept on the chip."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mimo_jax.kernels.by_rows import by_rows
from mimo_jax.kernels.dispatch import Chosen, Implementation, chosen
from mimo_jax.kernels.rvq_encode.reference import Encoded, encode


def rvq_encode(
    x_ND: jax.Array,
    codebooks: Sequence[jax.Array],
    num_levels: int | None = None,
    implementation: Implementation = "auto",
    *,
    sums: bool = True,
) -> Encoded:
    """Codes of vectors: at each level the nearest entry of what the levels before it leave over.

    Distances are x^2 - 2 x e + e^2 in float32 at the highest matmul precision; of entries at the same distance the
    first is taken. The kernels multiply in bfloat16 parts with the accuracy of float32, so that only codes whose two
    best entries are as near as rounding can depend on the implementation. Under a mesh each device takes its rows. In
    plain JAX run, whatever is asked for: float64, no vectors, codebooks that do not fit the fast memory of a TPU, and
    rows that the mesh does not divide.

    Args:
        x_ND: float vectors.
        codebooks: the entries [K, D] of each level, K >= 1; each of its own size and dtype, used at their float32
            values.
        num_levels: levels R that are wanted, the first ones; all by default.
        implementation: see `mimo_jax.kernels.dispatch`.
        sums: False leaves out all but the codes, and the kernels then write nothing else.

    Returns:
        See `Encoded`; float32, float64 if an argument is float64.

    Raises:
        ValueError: shapes do not fit.
    """
    x_ND, codebooks = jnp.asarray(x_ND), [jnp.asarray(book) for book in codebooks]
    levels = len(codebooks) if num_levels is None else num_levels
    if not 1 <= levels <= len(codebooks):
        raise ValueError(f"rvq_encode: expected 1 to {len(codebooks)} levels, got {levels}")
    books = codebooks[:levels]
    if x_ND.ndim != 2 or any(b.ndim != 2 or b.shape[0] == 0 or b.shape[1:] != x_ND.shape[1:] for b in books):
        shapes = [b.shape for b in books]
        raise ValueError(f"rvq_encode: expected x [N, D] and codebooks [K, D], got {x_ND.shape} and {shapes}")
    plain = jnp.result_type(x_ND, *books) == jnp.float64
    return by_rows(functools.partial(_encode, sums), "xla" if plain else chosen(implementation), x_ND, books)


def _encode(sums: bool, implementation: Chosen, x_ND: jax.Array, books: Sequence[jax.Array]) -> Encoded:
    if implementation in ("mosaic", "interpret"):
        from mimo_jax.kernels.rvq_encode import tpu

        if tpu.fits(x_ND, books, sums):
            return tpu.encode(x_ND, books, sums, interpret=implementation == "interpret")
    elif implementation == "triton":
        from mimo_jax.kernels.rvq_encode import gpu

        return gpu.encode(x_ND, books, sums)
    return encode(x_ND, books, sums)
