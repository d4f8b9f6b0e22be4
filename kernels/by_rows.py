"""Kernels whose rows do not depend on each other, under a mesh: each device takes its rows, and whole tables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

from mimo_jax.kernels.dispatch import Chosen, if_cut
from mimo_jax.sharding import BATCH_AXES, mesh_that_divides


def by_rows[Result](
    run: Callable[[Chosen, jax.Array, tuple[jax.Array, ...]], Result],
    implementation: Chosen,
    array: jax.Array,
    tables: Sequence[jax.Array],
) -> Result:
    """`run(implementation, array, tables)`, whose results have the leading axis of `array`; cut over the batch axes.

    Plain JAX runs where there are no rows, and where a mesh does not divide them: XLA cannot cut a kernel.
    """
    rows = array.shape[0]
    mesh = mesh_that_divides(batch=rows)
    run = functools.partial(run, if_cut(implementation, mesh) if rows else "xla")
    if mesh is not None:
        cut = PartitionSpec(BATCH_AXES)
        run = jax.shard_map(run, mesh=mesh, in_specs=(cut, PartitionSpec()), out_specs=cut, check_vma=False)
    return run(array, tuple(tables))
