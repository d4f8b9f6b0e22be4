"""`rvq_decode` for GPUs (Pallas, Triton): rows are gathered, summed in registers and written once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_TILE, _WIDTH = 32, 256  # vectors of a program, and the most of their width: 64 sums for each of its threads


def decode(rows_NR: jax.Array, books: Sequence[jax.Array], *, interpret: bool = False) -> jax.Array:
    """See `rvq_decode`; books of at most 32 bits, rows within them, N >= 1."""
    (n, levels), width = rows_NR.shape, books[0].shape[1]
    block = math.gcd(width, _WIDTH)  # a power of two, as Triton wants it
    rows_NR = jnp.pad(rows_NR, ((0, -n % _TILE), (0, 0)))
    padded = rows_NR.shape[0]
    tables = sum(b.size * b.dtype.itemsize for b in books)
    out_ND = pl.pallas_call(
        _kernel,
        grid=(padded // _TILE, width // block),
        in_specs=[
            pl.BlockSpec((_TILE, levels), lambda i, j: (i, 0)),
            *(pl.BlockSpec((b.shape[0], block), lambda i, j: (0, j)) for b in books),
        ],
        out_specs=pl.BlockSpec((_TILE, block), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((padded, width), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=padded * width * (levels - 1),
            bytes_accessed=tables + 4 * padded * (levels + width),
            transcendentals=0,
        ),
        compiler_params=plt.CompilerParams(num_warps=4),
        interpret=interpret,
    )(rows_NR, *books)
    return out_ND[:n]


def _kernel(rows_ref, *refs):
    *book_refs, out_ref = refs
    total = book_refs[0][rows_ref[:, 0], :].astype(jnp.float32)
    for level, book_ref in enumerate(book_refs[1:], start=1):
        total += book_ref[rows_ref[:, level], :].astype(jnp.float32)
    out_ref[...] = total
