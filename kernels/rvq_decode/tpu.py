"""`rvq_decode` for TPUs (Pallas, Mosaic): the codebooks stay in VMEM, and rows are looked up in the matrix unit.

Axes: N vectors of a tile, D width, K entries of a chunk of a level, R levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mimo_jax.kernels.rvq_encode.parts import bfloat16_parts, rows
from mimo_jax.kernels.rvq_encode.tpu import CHUNK, TILE, VMEM_LIMIT, block_bytes, matrix_unit_dtype


def fits(codes_NR: jax.Array, books: Sequence[jax.Array]) -> bool:
    """Whether the kernel's blocks and temporaries fit VMEM."""
    return vmem_bytes(codes_NR, books) <= VMEM_LIMIT


def vmem_bytes(codes_NR: jax.Array, books: Sequence[jax.Array]) -> int:
    """VMEM of the kernel's blocks, and of the largest temporaries by a bound."""
    (n, levels), width = codes_NR.shape, books[0].shape[1]
    tile, chunk = min(TILE, n), min(CHUNK, max(b.shape[0] for b in books))
    vectors = block_bytes(tile, width, jnp.float32)
    blocks = sum(block_bytes(b.shape[0], width, b.dtype) for b in books) + 2 * (
        block_bytes(tile, levels, jnp.int32) + vectors
    )
    # The sum and a lookup; the parts of a chunk and the steps to them; one-hot rows.
    return blocks + 2 * vectors + 4 * block_bytes(chunk, width, jnp.float32) + 2 * block_bytes(tile, chunk, jnp.float32)


def cost(codes_NR: jax.Array, books: Sequence[jax.Array]) -> pl.CostEstimate:
    """FLOPs of the matrix unit (in bfloat16, all passes), and the bytes that are moved between HBM and VMEM."""
    n, width = codes_NR.shape[0], books[0].shape[1]
    passes = sum(b.shape[0] * (1 if b.dtype == jnp.bfloat16 else 3) for b in books)
    moved = sum(b.size * b.dtype.itemsize for b in books) + 4 * codes_NR.size + 4 * n * width
    return pl.CostEstimate(flops=2 * n * width * passes, bytes_accessed=moved, transcendentals=0)


def decode(rows_NR: jax.Array, books: Sequence[jax.Array], *, interpret: bool = False) -> jax.Array:
    """See `rvq_decode`; books of at most 32 bits, rows within them, N >= 1."""
    books = [matrix_unit_dtype(b) for b in books]
    (n, levels), width = rows_NR.shape, books[0].shape[1]
    tile = min(TILE, n)
    return pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(n, tile),),
        in_specs=[
            pl.BlockSpec((tile, levels), lambda i: (i, 0)),
            *(pl.BlockSpec(b.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1)) for b in books),
        ],
        out_specs=pl.BlockSpec((tile, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((n, width), jnp.float32),
        cost_estimate=cost(rows_NR, books),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
    )(rows_NR, *books)


def _kernel(rows_ref, *refs):
    *book_refs, out_ref = refs
    for level, book_ref in enumerate(book_refs):
        row_N1 = rows_ref[:, level : level + 1]
        chunks = range(0, book_ref.shape[0], CHUNK)
        found_ND = sum(rows(bfloat16_parts(book_ref[first : first + CHUNK]), row_N1 - first) for first in chunks)
        out_ref[...] = found_ND if level == 0 else out_ref[...] + found_ND
