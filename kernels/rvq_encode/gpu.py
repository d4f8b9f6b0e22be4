"""`rvq_encode` for GPUs (Pallas, Triton): a program takes a tile of vectors through all levels.

Codebooks of some 20 MB do not fit on the chip, and a tile of float32 residuals of width 1280 hardly does. So a program
walks over both in blocks: the residual lies in an array of its own, which the program alone reads and writes (as far as
it goes from L1 and L2), and the entries come as their bfloat16 parts, which tensor cores multiply as they arrive.

The arrays that the kernel sees are padded to whole blocks: vectors and width with zeros, each level with entries that
are infinitely far away. Axes: N vectors, D width, K entries of a block, R levels, P parts, V entries of all levels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mimo_jax.kernels.rvq_encode.parts import bfloat16_parts, inner_products, lowest
from mimo_jax.kernels.rvq_encode.reference import Encoded

# Rows, entries and width of the blocks. In shared memory lie, twice, the parts of the entries and the residual: 128 KB.
_TILE, _ENTRIES, _WIDTH = 64, 128, 64


def encode(x_ND: jax.Array, books: Sequence[jax.Array], sums: bool, *, interpret: bool = False) -> Encoded:
    """See `rvq_encode`; x and books of at most 32 bits, N >= 1."""
    (n, width), levels = x_ND.shape, len(books)
    exact = jnp.bfloat16 if all(b.dtype == jnp.bfloat16 for b in books) else jnp.float32
    table_VD = jnp.concatenate([_padded(b.astype(exact), _ENTRIES, _WIDTH) for b in books])
    squares_V = jnp.concatenate(
        [_padded(jnp.sum(b.astype(jnp.float32) ** 2, axis=1)[:, None], _ENTRIES, 1, fill=jnp.inf)[:, 0] for b in books]
    )
    parts_PVD = jnp.stack(bfloat16_parts(table_VD))
    blocks = [pl.cdiv(b.shape[0], _ENTRIES) for b in books]
    first_block_R = np.array([0, *itertools.accumulate(blocks)], np.int32)
    residual_ND = _padded(x_ND.astype(jnp.float32), _TILE, _WIDTH)

    rows, padded_width = residual_ND.shape
    tile = lambda columns: pl.BlockSpec((_TILE, columns), lambda i: (i, 0))  # noqa: E731
    whole = lambda array: pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)  # noqa: E731
    shapes = [(padded_width, jnp.float32), (levels, jnp.int32)]
    shapes += [(padded_width, jnp.float32), (levels, jnp.float32)] * sums
    passes = 3 if exact == jnp.bfloat16 else 6
    _, codes_NR, *rest = pl.pallas_call(
        functools.partial(_kernel, interpret=interpret),
        grid=(rows // _TILE,),
        in_specs=[tile(padded_width), whole(parts_PVD), whole(squares_V), whole(first_block_R)],
        out_specs=[tile(columns) for columns, _ in shapes],
        out_shape=[jax.ShapeDtypeStruct((rows, columns), dtype) for columns, dtype in shapes],
        input_output_aliases={0: 0},
        cost_estimate=pl.CostEstimate(
            flops=2 * passes * rows * table_VD.size,
            bytes_accessed=4 * rows * sum(columns for columns, _ in shapes) + 4 * residual_ND.size + parts_PVD.nbytes,
            transcendentals=0,
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(residual_ND, parts_PVD, squares_V, first_block_R)
    if not sums:
        return Encoded(codes_NR[:n], None, None)
    return Encoded(codes_NR[:n], rest[0][:n, :width], rest[1][:n])


def _padded(array: jax.Array, rows: int, columns: int, fill: float = 0.0) -> jax.Array:
    """The array with its axes filled up to multiples of rows and columns."""
    widths = tuple((0, -size % unit) for size, unit in zip(array.shape, (rows, columns), strict=True))
    return jnp.pad(array, widths, constant_values=fill)


def _kernel(_, parts_ref, squares_ref, first_block_ref, residual_ref, codes_ref, *sum_refs, interpret: bool):
    num_parts, _, width = parts_ref.shape
    columns = lambda block: pl.ds(block * _WIDTH, _WIDTH)  # noqa: E731
    over_width = lambda body, start: jax.lax.fori_loop(0, width // _WIDTH, body, start)  # noqa: E731
    barrier = (lambda: None) if interpret else plt.debug_barrier
    zeros_N1 = jnp.zeros((_TILE, 1), jnp.float32)

    def first_norm(d, norm_N1):
        return norm_N1 + jnp.sum(residual_ref[:, columns(d)] ** 2, axis=1, keepdims=True)

    def search(block, best, norm_N1):
        best_N1, row_N1 = best
        entries = pl.ds(block * _ENTRIES, _ENTRIES)

        def multiply(d, cross_NK):
            residual_parts = bfloat16_parts(residual_ref[:, columns(d)])
            entry_parts = [parts_ref[p, entries, columns(d)] for p in range(num_parts)]
            # Scaled, so that no compiler adds in a tensor core, which truncates, what is added up here and rounded.
            return cross_NK - 2.0 * inner_products(residual_parts, entry_parts)

        cross_NK = over_width(multiply, jnp.zeros((_TILE, _ENTRIES), jnp.float32))
        least_N1, index_N1 = lowest(norm_N1 + cross_NK + squares_ref[entries][None, :])
        nearer_N1 = least_N1 < best_N1
        row_N1 = jnp.where(nearer_N1, index_N1 + block * _ENTRIES, row_N1)
        return jnp.where(nearer_N1, least_N1, best_N1), row_N1

    def level(r, norm_N1):
        first, end = first_block_ref[r], first_block_ref[r + 1]
        first_row_N1 = jnp.full((_TILE, 1), first * _ENTRIES, jnp.int32)
        far_N1 = jnp.full((_TILE, 1), jnp.inf, jnp.float32)
        search_level = functools.partial(search, norm_N1=norm_N1)
        row_N = jax.lax.fori_loop(first, end, search_level, (far_N1, first_row_N1))[1][:, 0]
        barrier()  # no thread writes what another has still to read, nor reads what is still to be written

        def subtract(d, norm_N1):
            chosen_ND = parts_ref[0, row_N, columns(d)].astype(jnp.float32)
            for p in range(1, num_parts):
                chosen_ND += parts_ref[p, row_N, columns(d)].astype(jnp.float32)
            left_ND = residual_ref[:, columns(d)] - chosen_ND
            residual_ref[:, columns(d)] = left_ND
            if sum_refs:
                sum_refs[0][:, columns(d)] = jnp.where(r == 0, 0.0, sum_refs[0][:, columns(d)]) + chosen_ND
            return norm_N1 + jnp.sum(left_ND**2, axis=1, keepdims=True)

        norm_N1 = over_width(subtract, zeros_N1)
        codes_ref[:, r] = row_N - first * _ENTRIES
        if sum_refs:
            sum_refs[1][:, r] = norm_N1[:, 0]
        barrier()
        return norm_N1

    jax.lax.fori_loop(0, codes_ref.shape[1], level, over_width(first_norm, zeros_N1))
