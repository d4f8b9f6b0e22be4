"""`delay_sample` as a Pallas kernel for GPUs, compiled by Triton: a program for each request."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mimo_jax.kernels.delay_sample.draw import Pattern, Rules, draw, uniform


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
    B, R, E = len(logits_BV), len(pattern.sizes), table_VE.shape[1]
    codes_BR, x_BE = pl.pallas_call(
        functools.partial(_kernel, pattern=pattern),
        grid=(B,),
        out_shape=[jax.ShapeDtypeStruct((B, R), jnp.int32), jax.ShapeDtypeStruct((B, E), jnp.float32)],
        cost_estimate=pl.CostEstimate(**pattern.cost(logits_BV, E, E * table_VE.dtype.itemsize)),
        compiler_params=plt.CompilerParams(num_warps=8),
        interpret=interpret,
    )(jnp.stack([step, *Rules.of(*params)]).astype(jnp.int32), logits_BV, uniform(bits_BR), *params, table_VE)
    return codes_BR, x_BE


def _kernel(scalars_ref, logits_ref, u_ref, *refs, pattern: Pattern):
    *params_refs, table_ref, codes_ref, x_ref = refs
    b = pl.program_id(0)
    step, rules = scalars_ref[0], Rules(*(scalars_ref[i] != 0 for i in (1, 2, 3)))
    E = table_ref.shape[1]
    columns_E = jnp.arange(pl.next_power_of_2(E))
    x_E = jnp.zeros(columns_E.shape, jnp.float32)
    for run in pattern.runs:
        shape = pl.next_power_of_2(run.channels), pl.next_power_of_2(run.size)
        channels_N1 = jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        is_one_N1 = channels_N1 < run.channels

        def draw_run(run=run, shape=shape, channels_N1=channels_N1, is_one_N1=is_one_N1):
            ids_NL = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            at_NL = run.start + channels_N1 * run.size + ids_NL
            logits_NL = plt.load(logits_ref.at[b, at_NL], mask=is_one_N1 & (ids_NL < run.size), other=0.0)
            u_N1 = plt.load(u_ref.at[b, run.first + channels_N1], mask=is_one_N1, other=0.0)
            params_N1 = (jnp.full((shape[0], 1), ref[b]) for ref in params_refs)
            return draw(logits_NL, run.size, u_N1, *params_N1, rules)

        def nothing(shape=shape):
            return jnp.zeros((shape[0], 1), jnp.int32)

        codes_N1 = jax.lax.cond(pattern.any_active(run, step), draw_run, nothing)
        for i in range(run.channels):
            r = run.first + i
            active = pattern.active(r, step)
            code = jnp.where(active, jnp.sum(jnp.where(channels_N1 == i, codes_N1, 0)), 0)
            codes_ref[b, r] = code
            row_ref = table_ref.at[pattern.starts[r] + code, columns_E]
            x_E += plt.load(row_ref, mask=(columns_E < E) & active, other=0.0).astype(jnp.float32)
    plt.store(x_ref.at[b, columns_E], x_E, mask=columns_E < E)
