"""`rvq_encode` for TPUs (Pallas, Mosaic): the codebooks stay in VMEM, and so does the residual of a tile of vectors.

Axes: N vectors of a tile, D width, K entries of a chunk of a level, R levels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mimo_jax.kernels.rvq_encode.parts import bfloat16_parts, inner_products, lowest, rows
from mimo_jax.kernels.rvq_encode.reference import Encoded

TILE = 256  # vectors; as many rows as hide the loading of the entries into the matrix unit
CHUNK = 512  # entries whose distances and bfloat16 parts exist at once
VMEM_LIMIT = 60 * 2**20  # of the 64 MiB of the smallest VMEM, that of v5p; v5e and v6e have 128 MiB


def fits(x_ND: jax.Array, books: Sequence[jax.Array], sums: bool) -> bool:
    """Whether the kernel's blocks and temporaries fit VMEM."""
    return vmem_bytes(x_ND, books, sums) <= VMEM_LIMIT


def vmem_bytes(x_ND: jax.Array, books: Sequence[jax.Array], sums: bool) -> int:
    """VMEM of the kernel's blocks, and of the largest temporaries by a bound."""
    tile, width, chunk = min(TILE, x_ND.shape[0]), x_ND.shape[1], min(CHUNK, max(b.shape[0] for b in books))
    vectors = block_bytes(tile, width, jnp.float32)
    blocks = sum(block_bytes(b.shape[0], width, b.dtype) for b in books)
    blocks += 2 * (
        block_bytes(tile, width, x_ND.dtype) + (1 + sums) * block_bytes(tile, len(books), jnp.int32) + sums * vectors
    )
    residual = vectors
    # Parts and the steps to them, of the residual and of a chunk; distances, indices and one-hot rows; the lookup.
    temporaries = 4 * vectors + 4 * block_bytes(chunk, width, jnp.float32) + 4 * block_bytes(tile, chunk, jnp.float32)
    return blocks + residual + temporaries


def block_bytes(rows: int, columns: int, dtype: jax.typing.DTypeLike) -> int:
    """VMEM of an array, in whole tiles."""
    size = jnp.dtype(dtype).itemsize
    return pl.cdiv(rows, 32 // size) * (32 // size) * pl.cdiv(columns, 128) * 128 * size


def matrix_unit_dtype(array: jax.Array) -> jax.Array:
    """The array in bfloat16 if it has that dtype, otherwise in float32."""
    return array if array.dtype == jnp.bfloat16 else array.astype(jnp.float32)


def cost(x_ND: jax.Array, books: Sequence[jax.Array], sums: bool) -> pl.CostEstimate:
    """FLOPs of the matrix unit (in bfloat16, all passes), and the bytes that are moved between HBM and VMEM."""
    (n, width), levels = x_ND.shape, len(books)
    passes = sum(b.shape[0] * (4 if b.dtype == jnp.bfloat16 else 9) for b in books)
    moved = x_ND.size * x_ND.dtype.itemsize + sum(b.size * b.dtype.itemsize for b in books) + 4 * n * levels
    return pl.CostEstimate(
        flops=2 * n * width * passes, bytes_accessed=moved + sums * 4 * n * (width + levels), transcendentals=0
    )


def encode(x_ND: jax.Array, books: Sequence[jax.Array], sums: bool, *, interpret: bool = False) -> Encoded:
    """See `rvq_encode`; x and books of at most 32 bits, N >= 1."""
    x_ND, *books = map(matrix_unit_dtype, (x_ND, *books))
    # Mosaic has no product with a single row. Of two entries that are the same, the first is taken.
    books = [b if b.shape[0] > 1 else jnp.repeat(b, 2, axis=0) for b in books]
    (n, width), levels = x_ND.shape, len(books)
    tile = min(TILE, n)
    by_tiles = lambda columns: pl.BlockSpec((tile, columns), lambda i: (i, 0))  # noqa: E731
    whole = [pl.BlockSpec(b.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1)) for b in books]
    shapes = [(levels, jnp.int32)] + [(width, jnp.float32), (levels, jnp.float32)] * sums
    out = pl.pallas_call(
        functools.partial(_kernel, levels=levels),
        grid=(pl.cdiv(n, tile),),
        in_specs=[by_tiles(width), *whole],
        out_specs=[by_tiles(columns) for columns, _ in shapes],
        out_shape=[jax.ShapeDtypeStruct((n, columns), dtype) for columns, dtype in shapes],
        scratch_shapes=[pltpu.VMEM((tile, width), jnp.float32)],
        cost_estimate=cost(x_ND, books, sums),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
    )(x_ND, *books)
    return Encoded(*out) if sums else Encoded(out[0], None, None)


def _kernel(x_ref, *refs, levels: int):
    book_refs, (codes_ref, *sum_refs), residual_ref = refs[:levels], refs[levels:-1], refs[-1]
    residual_ref[...] = x_ref[...].astype(jnp.float32)
    norm_N1 = _squared_norms(residual_ref)
    for level, book_ref in enumerate(book_refs):
        parts = bfloat16_parts(residual_ref[...])
        size = book_ref.shape[0]
        starts = range(0, size - 1, CHUNK)  # the last chunk takes one entry more rather than leave it alone
        found = (
            _nearest(norm_N1, parts, book_ref[first:end], first)
            for first, end in zip(starts, (*starts[1:], size), strict=True)
        )
        _, code_N1, chosen_ND = functools.reduce(_nearer, found)
        residual_ref[...] -= chosen_ND
        norm_N1 = _squared_norms(residual_ref)
        codes_ref[:, level : level + 1] = code_N1
        if sum_refs:
            quantized_ref, norms_ref = sum_refs
            quantized_ref[...] = chosen_ND if level == 0 else quantized_ref[...] + chosen_ND
            norms_ref[:, level : level + 1] = norm_N1


def _nearest(norm_N1, parts, entries_KD, first):
    """Of a chunk that begins at entry `first`: distance [N, 1] and index [N, 1] of the nearest entry, and the entry."""
    entry_parts = bfloat16_parts(entries_KD)
    squares_1K = jnp.sum(entries_KD.astype(jnp.float32) ** 2, axis=1)[None]
    least_N1, index_N1 = lowest(norm_N1 - 2.0 * inner_products(parts, entry_parts) + squares_1K)
    return least_N1, index_N1 + first, rows(entry_parts, index_N1)


def _nearer(best, other):
    return tuple(jnp.where(other[0] < best[0], b, a) for a, b in zip(best, other, strict=True))


def _squared_norms(ref) -> jax.Array:
    return jnp.sum(ref[...] ** 2, axis=1, keepdims=True)
