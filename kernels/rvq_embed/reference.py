"""`rvq_embed` and its gradient in plain JAX, on one device.

Axes: X everything before the frames, G frames, T steps, R channels, E width, V rows of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp


def spans(group_size: int, delays: Sequence[int], num_steps: int) -> Iterator[tuple[int, int, int]]:
    """Channel, first step and number of frames of what each channel adds to the steps, if anything."""
    for channel, delay in enumerate(delays):
        if delay < num_steps:
            yield channel, delay, min(group_size, num_steps - delay)


def embed(
    table_VE: jax.Array, rows_XGR: jax.Array, delays: Sequence[int], num_steps: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Sums [X, T, E], made in the table's dtype and handed out in `dtype`.

    Arguments as in `rvq_embed`, but for `rows_XGR`, which are rows of the table.
    """
    total = jnp.zeros((rows_XGR.shape[0], num_steps, table_VE.shape[1]), table_VE.dtype)
    for channel, first, frames in spans(rows_XGR.shape[1], delays, num_steps):
        one_XGE = table_VE[rows_XGR[:, :frames, channel]]
        total += jnp.pad(one_XGE, ((0, 0), (first, num_steps - first - frames), (0, 0)))
    return total.astype(dtype)


def embed_gradient(
    table: jax.ShapeDtypeStruct, rows_XGR: jax.Array, gradient_XTE: jax.Array, delays: Sequence[int]
) -> jax.Array:
    """Gradient of the table [V, E], summed in the table's dtype."""
    total_VE = jnp.zeros(table.shape, table.dtype)
    for channel, first, frames in spans(rows_XGR.shape[1], delays, gradient_XTE.shape[1]):
        new_XGE = gradient_XTE[:, first : first + frames].astype(total_VE.dtype)
        total_VE = total_VE.at[rows_XGR[:, :frames, channel]].add(new_XGE)
    return total_VE
