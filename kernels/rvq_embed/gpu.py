"""`rvq_embed` and its gradient on GPU: Pallas, compiled by Triton. Lowered for H100, not run on one.

Forward, a program gathers the rows of a few steps. Backward, the codes are sorted by row (XLA), and a program adds up
what belongs to one row, in that order: no atomic additions, so that the bits are the same in every run.

Axes: X everything before the frames, G frames, T steps, R channels, E width, V rows of the table; N X * T; K codes that
are added to a step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mimo_jax.kernels.rvq_embed.reference import spans

_LANES = 256  # of a tile, at most
_STEPS = 16  # rows of a tile: with 256 lanes, 32 registers of each thread of 4 warps


def embed(
    table_VE: jax.Array,
    rows_XGR: jax.Array,
    delays: Sequence[int],
    num_steps: int,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`reference.embed` of a float32 table, nothing of it empty."""
    E, (X, G, _), T = table_VE.shape[1], rows_XGR.shape, num_steps
    lanes = min(_LANES, pl.next_power_of_2(E))
    out_NE = pl.pallas_call(
        functools.partial(_embed_kernel, group_size=G, delays=tuple(delays), num_steps=T, lanes=lanes),
        grid=(pl.cdiv(X * T, _STEPS), pl.cdiv(E, lanes)),
        out_shape=jax.ShapeDtypeStruct((X * T, E), dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        cost_estimate=_cost(_codes(G, delays, T) * X * E, table_VE, rows_XGR, X * T * E * jnp.dtype(dtype).itemsize),
        interpret=interpret,
    )(table_VE, rows_XGR.reshape(-1))
    return out_NE.reshape(X, T, E)


def embed_gradient(
    table: jax.ShapeDtypeStruct,
    rows_XGR: jax.Array,
    gradient_XTE: jax.Array,
    delays: Sequence[int],
    *,
    interpret: bool = False,
) -> jax.Array:
    """`reference.embed_gradient` of a float32 table, nothing empty. The same bits in every run."""
    (V, E), (X, G, _), T = table.shape, rows_XGR.shape, gradient_XTE.shape[1]
    rows, steps = [], []
    for channel, first, frames in spans(G, delays, T):
        rows.append(rows_XGR[:, :frames, channel].reshape(-1))
        steps.append((T * jnp.arange(X)[:, None] + first + jnp.arange(frames)).reshape(-1))
    rows_K, steps_K = jax.lax.sort((jnp.concatenate(rows), jnp.concatenate(steps)), num_keys=1, is_stable=True)
    begins = jnp.searchsorted(rows_K, jnp.arange(V + 1, dtype=jnp.int32)).astype(jnp.int32)
    lanes = min(_LANES, pl.next_power_of_2(E))
    # Each code reads its step's gradient.
    read = rows_K.size * E * gradient_XTE.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_gradient_kernel, lanes=lanes),
        grid=(V, pl.cdiv(E, lanes)),
        out_shape=table,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=_cost(rows_K.size * E, table, steps_K, read),
        interpret=interpret,
    )(begins, steps_K, gradient_XTE.reshape(X * T, E))


def _codes(group_size: int, delays: Sequence[int], num_steps: int) -> int:
    """Codes of a patch that are added to a step."""
    return sum(frames for _, _, frames in spans(group_size, delays, num_steps))


def _cost(additions: int, table, rows: jax.Array, step_bytes: int) -> pl.CostEstimate:
    bytes_accessed = 4 * (table.size + rows.size) + step_bytes
    return pl.CostEstimate(flops=additions, transcendentals=0, bytes_accessed=bytes_accessed)


def _embed_kernel(
    table_ref, rows_ref, out_ref, *, group_size: int, delays: tuple[int, ...], num_steps: int, lanes: int
):
    n = pl.program_id(0) * _STEPS + jnp.arange(_STEPS)
    e = (pl.program_id(1) * lanes + jnp.arange(lanes))[None]
    inside, wide = n < out_ref.shape[0], e < out_ref.shape[1]
    total = jnp.zeros((_STEPS, lanes), jnp.float32)
    for channel, delay in enumerate(delays):
        frame = n % num_steps - delay
        here = inside & (frame >= 0) & (frame < group_size)
        code = (n // num_steps * group_size + frame) * len(delays) + channel
        row = plt.load(rows_ref.at[code], mask=here, other=0)
        total += plt.load(table_ref.at[row[:, None], e], mask=here[:, None] & wide, other=0.0)
    plt.store(out_ref.at[n[:, None], e], total.astype(out_ref.dtype), mask=inside[:, None] & wide)


def _gradient_kernel(begins_ref, steps_ref, gradient_ref, total_ref, *, lanes: int):
    v, e = pl.program_id(0), pl.program_id(1) * lanes + jnp.arange(lanes)
    begin, end = plt.load(begins_ref.at[v]), plt.load(begins_ref.at[v + 1])
    wide = e < total_ref.shape[1]

    def add(i, total):
        k = begin + i * _STEPS + jnp.arange(_STEPS)
        here = k < end
        step = plt.load(steps_ref.at[k], mask=here, other=0)
        new = plt.load(gradient_ref.at[step[:, None], e[None]], mask=here[:, None] & wide[None], other=0.0)
        return total + new.astype(jnp.float32)

    zeros = jnp.zeros((_STEPS, lanes), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(end - begin, _STEPS), add, zeros)
    plt.store(total_ref.at[v, e], total.sum(0), mask=wide)
