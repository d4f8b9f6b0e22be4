"""Codes of an RVQ to the vectors that they stand for: the sum over the levels, with one pass over the output."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mimo_jax.kernels.by_rows import by_rows
from mimo_jax.kernels.dispatch import Chosen, Implementation, chosen
from mimo_jax.kernels.rvq_decode.reference import decode, rows_of


def rvq_decode(
    codes_NR: jax.Array, codebooks: Sequence[jax.Array], implementation: Implementation = "auto"
) -> jax.Array:
    """Sum of the entries that the codes name, level by level in float32, the same in every implementation.

    Under a mesh each device takes its rows. In plain JAX run, whatever is asked for: float64, no vectors, codebooks
    that do not fit the fast memory of a TPU, and rows that the mesh does not divide. Only plain JAX has a gradient.

    Args:
        codes_NR: integers; R >= 1 levels, which may be fewer than there are codebooks. Outside of 0..K-1 JAX's rule
            for indices holds: negative codes count from the end, and what is then still outside takes the first or
            the last entry.
        codebooks: the entries [K, D] of each level, K >= 1; each of its own size and dtype.
        implementation: see `mimo_jax.kernels.dispatch`.

    Returns:
        [N, D] float32, or float64 if a codebook is float64.

    Raises:
        ValueError: shapes do not fit.
    """
    codes_NR, codebooks = jnp.asarray(codes_NR), [jnp.asarray(book) for book in codebooks]
    if codes_NR.ndim != 2 or not 1 <= codes_NR.shape[1] <= len(codebooks):
        raise ValueError(f"rvq_decode: expected codes [N, R] of 1 to {len(codebooks)} levels, got {codes_NR.shape}")
    books = codebooks[: codes_NR.shape[1]]
    if any(b.ndim != 2 or b.shape[0] == 0 or b.shape[1:] != books[0].shape[1:] for b in books):
        raise ValueError(f"rvq_decode: expected codebooks [K, D], got {[b.shape for b in books]}")
    plain = jnp.result_type(*books) == jnp.float64
    return by_rows(_decode, "xla" if plain else chosen(implementation), codes_NR, books)


def _decode(implementation: Chosen, codes_NR: jax.Array, books: Sequence[jax.Array]) -> jax.Array:
    if implementation in ("mosaic", "interpret"):
        from mimo_jax.kernels.rvq_decode import tpu

        if tpu.fits(codes_NR, books):
            return tpu.decode(rows_of(codes_NR, books), books, interpret=implementation == "interpret")
    elif implementation == "triton":
        from mimo_jax.kernels.rvq_decode import gpu

        return gpu.decode(rows_of(codes_NR, books), books)
    return decode(codes_NR, books)
