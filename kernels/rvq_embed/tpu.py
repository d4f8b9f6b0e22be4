"""`rvq_embed` and its gradient on TPU: Pallas, compiled by Mosaic.

1024 values of a row of the tables are one vector register. The tables lie in VMEM and are read, or added to, by the
number of the row, which lies in SMEM: a load and an addition per code, in float32. For a row of 6144 patches on v5e
the compiler schedules 0.28 ms of them, and 0.39 ms for the gradient. Products with one-hot rows would take the matrix
units 0.7 ms in each of the three bfloat16 passes that make up float32.

Axes: X everything before the frames, in blocks of P; G frames, T steps, R channels, V rows of the table; E width, J
blocks of S x 128 lanes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mimo_jax.kernels.rvq_embed.reference import spans

_LANES, _SUBLANES = 128, 8
_STEPS = 1024  # of a block, about
_MOST_VMEM = 48 * 2**20  # for the blocks; tpu7x has 64 MiB in all
_SLACK = 8 * 2**20  # what the compiler may keep there besides


def blocks(num_rows: int, width: int, codes: int, num_steps: int, itemsize: int) -> tuple[int, int, int] | None:
    """Sizes of the blocks, and the VMEM that they take.

    Args:
        num_rows: V.
        width: E.
        codes: G * R.
        num_steps: T.
        itemsize: bytes of a value of a step.

    Returns:
        P, S and bytes of VMEM; or None if no blocks fit.
    """
    patches = max(16, min(128, _STEPS // max(num_steps, codes // 16) // 16 * 16))
    sublanes = min(_SUBLANES, pl.cdiv(width, _LANES))
    while sublanes:
        row = 4 * _LANES * sublanes
        # Two buffers of what comes or goes, and the steps in float32.
        taken = 2 * num_rows * row + patches * num_steps * (2 * itemsize * _LANES * sublanes + row)
        if taken <= _MOST_VMEM:
            return patches, sublanes, taken
        sublanes //= 2
    return None


def embed(
    table_VE: jax.Array,
    rows_XGR: jax.Array,
    delays: Sequence[int],
    num_steps: int,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`reference.embed` of a float32 table, nothing empty; `blocks` must fit."""
    (V, E), (X, G, R), T, dtype = table_VE.shape, rows_XGR.shape, num_steps, jnp.dtype(dtype)
    P, S, J, params = _plan(V, E, G * R, T, dtype.itemsize, "parallel")
    lanes = S * _LANES
    table_JVl = jnp.pad(table_VE, ((0, 0), (0, J * lanes - E))).reshape(V, J, lanes).swapaxes(0, 1)
    places = _places(G, delays, T)
    codes_T = [[frame * R + channel for frame, channel, step in places if step == t] for t in range(T)]
    out = pl.pallas_call(
        functools.partial(_embed_kernel, codes_T=codes_T, sublanes=S, patches=X),
        grid=(J, pl.cdiv(X, P)),
        in_specs=[
            pl.BlockSpec((P, G * R), lambda j, i: (i, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((None, V * S, _LANES), lambda j, i: (j, 0, 0)),
        ],
        out_specs=pl.BlockSpec((T, P, min(lanes, E)), lambda j, i: (0, i, j)),
        out_shape=jax.ShapeDtypeStruct((T, X, E), dtype),
        scratch_shapes=[pltpu.VMEM((T * P * S, _LANES), jnp.float32)],
        compiler_params=params,
        cost_estimate=_cost(len(places) * X * E, J * rows_XGR.size, J * V * lanes, X * T * E * dtype.itemsize),
        interpret=interpret,
    )(S * rows_XGR.reshape(X, G * R), table_JVl.reshape(J, V * S, _LANES))
    return out.swapaxes(0, 1)


def embed_gradient(
    table: jax.ShapeDtypeStruct,
    rows_XGR: jax.Array,
    gradient_XTE: jax.Array,
    delays: Sequence[int],
    *,
    interpret: bool = False,
) -> jax.Array:
    """`reference.embed_gradient` of a float32 table, nothing empty; `blocks` must fit. The same bits in every run."""
    (V, E), (X, G, R), T = table.shape, rows_XGR.shape, gradient_XTE.shape[1]
    itemsize = gradient_XTE.dtype.itemsize
    P, S, J, params = _plan(V, E, G * R, T, itemsize, "arbitrary")
    lanes = S * _LANES
    places = _places(G, delays, T)
    codes_G = [[(g * R + channel, step) for frame, channel, step in places if frame == g] for g in range(G)]
    total_JVl = pl.pallas_call(
        functools.partial(_gradient_kernel, codes_G=codes_G, sublanes=S, patches=X),
        grid=(J, pl.cdiv(X, P)),
        in_specs=[
            pl.BlockSpec((P, G * R), lambda j, i: (i, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((T, P, min(lanes, E)), lambda j, i: (0, i, j)),
        ],
        out_specs=pl.BlockSpec((None, V * S, _LANES), lambda j, i: (j, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((J, V * S, _LANES), jnp.float32),
        scratch_shapes=[pltpu.VMEM((T * P * S, _LANES), jnp.float32)],
        compiler_params=params,
        cost_estimate=_cost(len(places) * X * E, J * rows_XGR.size, J * V * lanes, X * T * E * itemsize),
        interpret=interpret,
    )(S * rows_XGR.reshape(X, G * R), gradient_XTE.swapaxes(0, 1))
    return total_JVl.reshape(J, V, lanes).swapaxes(0, 1).reshape(V, J * lanes)[:, :E]


_Semantics = Literal["parallel", "arbitrary"]


def _plan(num_rows: int, width: int, codes: int, num_steps: int, itemsize: int, patches: _Semantics):
    """P, S, J and what the compiler is told, for a grid over the blocks of E and those of X."""
    sizes = blocks(num_rows, width, codes, num_steps, itemsize)
    assert sizes is not None, "no block of the tables fits VMEM"
    P, S, taken = sizes
    params = pltpu.CompilerParams(dimension_semantics=("parallel", patches), vmem_limit_bytes=taken + _SLACK)
    return P, S, pl.cdiv(width, S * _LANES), params


def _places(group_size: int, delays: Sequence[int], num_steps: int) -> list[tuple[int, int, int]]:
    """(Frame, channel, step) of the codes of a patch that are added to a step, channel by channel."""
    return [(g, r, first + g) for r, first, frames in spans(group_size, delays, num_steps) for g in range(frames)]


def _cost(additions: int, codes: int, values: int, step_bytes: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=additions, transcendentals=0, bytes_accessed=4 * codes + 4 * values + step_bytes)


def _each_patch(patches: int, block: int, body) -> None:
    """Calls `body` with the index of every patch of the block; the last block may hold fewer."""

    def patch(p, carry):
        body(p)
        return carry

    jax.lax.fori_loop(0, jnp.minimum(block, patches - pl.program_id(1) * block), patch, 0)


def _register(ref, row, sublanes: int):
    """One row, which begins at `row` of an array of registers."""
    return ref.at[pl.ds(pl.multiple_of(row, sublanes), sublanes), :]


def _pieces(steps_ref, sublanes: int):
    """Of each step, 128 lanes at a time: where they are in its block [T, P, lanes], and where in the registers."""
    T, P, width = steps_ref.shape
    for t, s in itertools.product(range(T), range(sublanes)):
        lanes = min(width - s * _LANES, _LANES)
        yield (
            (t, slice(None), pl.ds(s * _LANES, lanes)),
            (pl.ds(t * P * sublanes + s, P, stride=sublanes), pl.ds(0, lanes)),
        )


def _embed_kernel(rows_ref, table_ref, out_ref, sums_ref, *, codes_T, sublanes: int, patches: int):
    P = rows_ref.shape[0]

    def sums(p):
        for t, codes in enumerate(codes_T):
            total = jnp.zeros((sublanes, _LANES), jnp.float32)
            for code in codes:
                total += _register(table_ref, rows_ref[p, code], sublanes)[...]
            _register(sums_ref, (t * P + p) * sublanes, sublanes)[...] = total

    _each_patch(patches, P, sums)
    for lanes, registers in _pieces(out_ref, sublanes):
        out_ref[lanes] = sums_ref[registers].astype(out_ref.dtype)


def _gradient_kernel(rows_ref, gradient_ref, total_ref, new_ref, *, codes_G, sublanes: int, patches: int):
    P = rows_ref.shape[0]

    @pl.when(pl.program_id(1) == 0)
    def _():
        def clear(v, carry):
            _register(total_ref, v * sublanes, sublanes)[...] = jnp.zeros((sublanes, _LANES), jnp.float32)
            return carry

        jax.lax.fori_loop(0, total_ref.shape[0] // sublanes, clear, 0)

    for lanes, registers in _pieces(gradient_ref, sublanes):
        new_ref[registers] = gradient_ref[lanes].astype(jnp.float32)

    def add(p):
        for codes in codes_G:
            # The channels of a frame have rows of their own: all can be read before any is written.
            rows = [_register(total_ref, rows_ref[p, code], sublanes) for code, _ in codes]
            news = [_register(new_ref, (step * P + p) * sublanes, sublanes) for _, step in codes]
            totals = [row[...] + new[...] for row, new in zip(rows, news, strict=True)]
            for row, total in zip(rows, totals, strict=True):
                row[...] = total

    _each_patch(patches, P, add)
