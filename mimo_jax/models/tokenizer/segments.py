"""Arithmetic on packed rows: positions, neighbours and sums that stay inside a segment.

B rows, L positions on any grid. Segments are runs of one id; ids count from 1, and 0 is padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def shift(x: jax.Array, steps: int) -> jax.Array:
    """Moves axis 1 by `steps` towards higher indices (lower if negative), filling with zeros: y[i] = x[i - steps]."""
    if steps == 0:
        return x
    length, size = x.shape[1], min(abs(steps), x.shape[1])
    zeros = jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype)
    parts = [zeros, x[:, : length - size]] if steps > 0 else [x[:, size:], zeros]
    return jnp.concatenate(parts, axis=1)


def same_segment(segment_ids_BL: jax.Array, steps: int) -> jax.Array:
    """Whether position i and position i - steps exist and belong to one segment: bool [B, L]."""
    return (segment_ids_BL > 0) & (segment_ids_BL == shift(segment_ids_BL, steps))


def segment_positions(segment_ids_BL: jax.Array) -> jax.Array:
    """Index of each position within its segment: int32 [B, L], 0 at padding."""
    index_BL = jnp.broadcast_to(jnp.arange(segment_ids_BL.shape[1], dtype=jnp.int32), segment_ids_BL.shape)
    starts_BL = jnp.where(same_segment(segment_ids_BL, 1), 0, index_BL)
    positions_BL = index_BL - jax.lax.cummax(starts_BL, axis=1)
    return jnp.where(segment_ids_BL > 0, positions_BL, 0)


def segment_sum(values_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Sum of `values_BL` over the segment that each position belongs to: [B, L]."""
    num_segments = segment_ids_BL.shape[1] + 1

    def row(values_L: jax.Array, ids_L: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values_L, ids_L, num_segments=num_segments)[ids_L]

    return jax.vmap(row)(values_BL, segment_ids_BL)
