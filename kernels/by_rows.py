"""Kernels whose rows do not depend on each other, under a mesh: each device takes its rows, and whole tables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

from mimo_jax.kernels.dispatch import Chosen
from mimo_jax.sharding import BATCH_AXES, current_mesh, mesh_that_divides


def by_rows[Result](
    run: Callable[[Chosen, jax.Array, tuple[jax.Array, ...]], Result],
    implementation: Chosen,
    array: jax.Array,
    tables: Sequence[jax.Array],
) -> Result:
    """`run(implementation, array, tables)`, whose results have the leading axis of `array`; cut over the batch axes.

    Plain JAX runs where there are no rows, and where a mesh does not divide them: XLA cannot cut a kernel.
    """
    rows, mesh, whole = array.shape[0], mesh_that_divides(batch=array.shape[0]), current_mesh()
    if rows == 0 or (mesh is None and whole is not None and whole.size > 1):
        implementation = "xla"
    run = functools.partial(run, implementation)
    if mesh is not None:
        cut = PartitionSpec(BATCH_AXES)
        run = jax.shard_map(run, mesh=mesh, in_specs=(cut, PartitionSpec()), out_specs=cut, check_vma=False)
    return run(array, tuple(tables))
