"""`delay_sample` as a Pallas kernel for TPUs: one read of the logits, and of the embeddings only the rows drawn.

A program takes up to 64 requests. The rows of a run of channels are the channels times the requests, the lanes its ids.
Each drawn row of the table is copied by itself (E values; a product with one-hot codes would read the table, 3,000 rows
in production). bfloat16 rows lie in memory in pairs, one word for each two values, and are copied as such.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mimo_jax.kernels.delay_sample.draw import Pattern, Rules, draw, uniform

_TILE = 64  # requests of a program
_LANES, _SUBLANES = 128, 8
VMEM_LIMIT = 64 << 20


def vmem_bytes(requests: int, width: int, pattern: Pattern) -> int:
    """VMEM that a program uses: two of each block, the copied rows, and eight arrays of the largest run; float32."""
    tile = min(requests, _TILE)

    def array(rows: int, columns: int) -> int:
        return 4 * -(-rows // _SUBLANES) * _SUBLANES * -(-columns // _LANES) * _LANES

    blocks = [sum(pattern.sizes), len(pattern.sizes), 1, 1, 1, len(pattern.sizes), width]
    drawn = max(array(run.channels * tile, run.size) for run in pattern.runs)
    return 2 * sum(array(tile, n) for n in blocks) + len(pattern.sizes) * array(tile, width) + 8 * drawn


def delay_sample(
    logits_BV: jax.Array,
    bits_BR: jax.Array,
    step: jax.Array,
    table_VE: jax.Array,
    params: tuple[jax.Array, jax.Array, jax.Array],
    pattern: Pattern,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as in `op`, of float32 or bfloat16; at least one request."""
    (B, V), R, E = logits_BV.shape, len(pattern.sizes), table_VE.shape[1]
    tile, packed = min(B, _TILE), table_VE.dtype == jnp.bfloat16
    if packed and V % 2:
        table_VE = jnp.pad(table_VE, ((0, 1), (0, 0)))
    row_bytes = E * table_VE.dtype.itemsize * (1 + packed)

    def block(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((tile, columns), lambda b, _: (b, 0))

    codes_BR, x_BE = pl.pallas_call(
        functools.partial(_kernel, pattern=pattern),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(B, tile),),
            in_specs=[*map(block, (V, R, 1, 1, 1)), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[block(R), block(E)],
            scratch_shapes=[
                pltpu.VMEM((R, tile, E), jnp.uint32 if packed else table_VE.dtype),
                pltpu.SMEM((tile, R), jnp.int32),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, R), jnp.int32), jax.ShapeDtypeStruct((B, E), jnp.float32)],
        cost_estimate=pl.CostEstimate(**pattern.cost(logits_BV, E, row_bytes)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
    )(
        jnp.stack([step, *Rules.of(*params)]).astype(jnp.int32),
        logits_BV,
        uniform(bits_BR),
        *(x[:, None] for x in params),
        table_VE,
    )
    return codes_BR, x_BE


def _kernel(scalars_ref, logits_ref, u_ref, *refs, pattern: Pattern):
    *params_refs, table_ref, codes_ref, x_ref, rows_ref, scalar_codes_ref, semaphore = refs
    step, rules = scalars_ref[0], Rules(*(scalars_ref[i] != 0 for i in (1, 2, 3)))
    tile = logits_ref.shape[0]
    logits_BV = logits_ref[...].astype(jnp.float32)
    for run in pattern.runs:

        def draw_run(run=run):
            starts = [run.start + i * run.size for i in range(run.channels)]
            padding = ((0, 0), (0, -run.size % _LANES))
            logits_NL = jnp.concatenate([jnp.pad(logits_BV[:, a : a + run.size], padding) for a in starts])
            u_N1 = jnp.concatenate([u_ref[:, pl.ds(run.first + i, 1)] for i in range(run.channels)])
            params_N1 = (jnp.concatenate([ref[...]] * run.channels) for ref in params_refs)
            return draw(logits_NL, run.size, u_N1, *params_N1, rules)

        def nothing(run=run):
            return jnp.zeros((run.channels * tile, 1), jnp.int32)

        codes_N1 = jax.lax.cond(pattern.any_active(run, step), draw_run, nothing)
        for i in range(run.channels):
            codes_B1 = codes_N1[i * tile : (i + 1) * tile]
            codes_ref[:, pl.ds(run.first + i, 1)] = jnp.where(pattern.active(run.first + i, step), codes_B1, 0)

    as_scalars = pltpu.make_async_copy(codes_ref, scalar_codes_ref, semaphore)  # scalars address the rows
    as_scalars.start()
    as_scalars.wait()
    packed = rows_ref.dtype != table_ref.dtype
    source_ref = table_ref.bitcast(rows_ref.dtype) if packed else table_ref

    def each_row(do: Callable[[Any], None]) -> None:
        for r, start in enumerate(pattern.starts):

            def copy(b: jax.Array, _: None, r: int = r, start: int = start) -> None:
                row = (start + scalar_codes_ref[b, r]) >> packed
                do(pltpu.make_async_copy(source_ref.at[pl.ds(row, 1)], rows_ref.at[r, pl.ds(b, 1)], semaphore))

            @pl.when(pattern.active(r, step))
            def _(copy=copy):
                jax.lax.fori_loop(0, tile, copy, None)

    each_row(lambda copy: copy.start())
    each_row(lambda copy: copy.wait())
    x_BE = jnp.zeros(x_ref.shape, jnp.float32)
    for r, start in enumerate(pattern.starts):
        rows_BE = rows_ref[r]
        if packed:
            odd_B1 = (codes_ref[:, pl.ds(r, 1)] + start) & 1
            words_BE = jnp.where(odd_B1 == 1, rows_BE & jnp.uint32(0xFFFF0000), rows_BE << 16)
            rows_BE = jax.lax.bitcast_convert_type(words_BE, jnp.float32)
        x_BE += jnp.where(pattern.active(r, step), rows_BE, 0.0)
    x_ref[...] = x_BE
