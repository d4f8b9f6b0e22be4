"""The lookup that patch encoder and patch decoder share: one pass over all RVQ channels.

Under a mesh every device gathers the tables (a few MB), looks its own patches up, and hands its part of the tables'
gradient to the sum, once for all patches of its rows. Left to itself, XLA cuts the embeddings along their width, as the
tables are cut, and moves them all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mimo_jax.kernels.dispatch import Chosen, Implementation, chosen, if_cut
from mimo_jax.kernels.rvq_embed import reference
from mimo_jax.sharding import BATCH_AXES, mesh_that_divides


def rvq_embed(
    table_VE: jax.Array,
    codes: jax.Array,
    sizes: Sequence[int],
    *,
    delays: Sequence[int] | None = None,
    num_steps: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Sum over the RVQ channels of the embeddings of their codes.

    Args:
        table_VE: the tables of the channels one below the other; V is the sum of `sizes`. Under a mesh E is cut over
            `fsdp`. Values are looked up and added in float32 (float64 for float64), gradients too.
        codes: int [B, ..., G, R] codes of G frames. The last code of a channel means "empty" and adds nothing. Under a
            mesh B is cut over the batch axes.
        sizes: rows of each channel's table, "empty" included.
        delays: steps by which each channel is late: frame g of channel r is added to step `delays[r] + g`. By default
            none.
        num_steps: steps T that are handed out, G by default; what would be added to a later one is left out.
        dtype: of the result, by default that of the table.
        implementation: as in `mimo_jax.kernels.dispatch`. For float64 plain JAX runs, and on TPU for tables of which no
            block fits VMEM.

    Returns:
        [B, ..., T, E].

    Raises:
        ValueError: shapes do not fit.
    """
    channels, width = len(sizes), table_VE.shape[1]
    delays = tuple(delays or (0,) * channels)
    num_steps = codes.shape[-2] if num_steps is None else num_steps
    if codes.ndim < 3 or codes.shape[-1] != channels or len(delays) != channels or table_VE.shape[0] != sum(sizes):
        raise ValueError(
            f"rvq_embed: expected codes [B, ..., G, {channels}], {channels} delays and a table of {sum(sizes)} rows, "
            f"got {codes.shape}, {len(delays)} and {table_VE.shape}"
        )
    if min(delays) < 0:
        raise ValueError(f"rvq_embed: expected delays of at least 0, got {delays}")
    sizes_R = np.array(sizes)
    starts_R = np.cumsum(sizes_R) - sizes_R
    # Blanking the rows is one small copy; masking what was looked up makes the backward pass 10 times slower (CPU), and
    # writing the rows into the table costs TPUs two more copies.
    empty_V = np.isin(np.arange(len(table_VE)), starts_R + sizes_R - 1)
    table_VE = jnp.where(empty_V[:, None], 0, table_VE)
    rows = jnp.asarray(codes, jnp.int32) + starts_R.astype(np.int32)
    rows_BNGR = rows.reshape(rows.shape[0], math.prod(rows.shape[1:-2]), *rows.shape[-2:])
    dtype = jnp.dtype(dtype or table_VE.dtype)
    run = if_cut(chosen(implementation), mesh_that_divides(batch=rows_BNGR.shape[0], fsdp=width))
    nothing = 0 in (rows.size, width) or min(delays) >= num_steps
    if nothing or np.float64 in (dtype, table_VE.dtype):
        run = "xla"
    if run in ("mosaic", "interpret"):
        from mimo_jax.kernels.rvq_embed.tpu import blocks

        if blocks(*table_VE.shape, math.prod(codes.shape[-2:]), num_steps, dtype.itemsize) is None:
            run = "xla"
    if run != "xla":
        rows_BNGR = jnp.clip(rows_BNGR, 0, len(table_VE) - 1)  # as XLA does it: kernels read wherever they are told to
    out = _embed(delays, num_steps, dtype, run, table_VE, rows_BNGR)
    return out.reshape(*codes.shape[:-2], num_steps, width)


def _functions(run: Chosen) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """`embed` and `embed_gradient` of the implementation."""
    if run == "xla":
        return reference.embed, reference.embed_gradient
    if run == "triton":
        from mimo_jax.kernels.rvq_embed import gpu

        return gpu.embed, gpu.embed_gradient
    from mimo_jax.kernels.rvq_embed import tpu

    interpret = run == "interpret"
    return functools.partial(tpu.embed, interpret=interpret), functools.partial(tpu.embed_gradient, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _embed(delays, num_steps, dtype, run, table_VE, rows_BNGR):
    mesh = mesh_that_divides(batch=rows_BNGR.shape[0], fsdp=table_VE.shape[1])
    embed, _ = _functions(run)

    def look_up(table_VE, rows_BNGR):
        wide = jnp.promote_types(table_VE.dtype, jnp.float32)
        if mesh is not None:
            table_VE = jax.lax.all_gather(table_VE, "fsdp", axis=1, tiled=True)
        B, N, G, R = rows_BNGR.shape
        out = embed(table_VE.astype(wide), rows_BNGR.reshape(B * N, G, R), delays, num_steps, dtype)
        return out.reshape(B, N, *out.shape[1:])

    if mesh is None:
        return look_up(table_VE, rows_BNGR)
    specs = (PartitionSpec(None, "fsdp"), PartitionSpec(BATCH_AXES))
    return jax.shard_map(look_up, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False)(table_VE, rows_BNGR)


def _save(delays, num_steps, dtype, run, table_VE, rows_BNGR):
    return _embed(delays, num_steps, dtype, run, table_VE, rows_BNGR), (table_VE, rows_BNGR)


def _gradients(delays, num_steps, dtype, run, saved, gradient_BNTE):
    table_VE, rows_BNGR = saved
    mesh = mesh_that_divides(batch=rows_BNGR.shape[0], fsdp=table_VE.shape[1])
    _, embed_gradient = _functions(run)

    def add_up(rows_BNGR, gradient_BNTE):
        B, N, G, R = rows_BNGR.shape
        E = gradient_BNTE.shape[-1]
        table = jax.ShapeDtypeStruct((len(table_VE), E), jnp.promote_types(table_VE.dtype, jnp.float32))
        gradient_XTE = gradient_BNTE.reshape(B * N, num_steps, E)
        total_VE = embed_gradient(table, rows_BNGR.reshape(B * N, G, R), gradient_XTE, delays)
        if mesh is not None:
            # Scattered over the major axis: TPUs would sum whole what is scattered over the minor one.
            total_VE = jax.lax.psum_scatter(total_VE.T, "fsdp", scatter_dimension=0, tiled=True).T
            total_VE = jax.lax.psum(total_VE, "data")
        return total_VE.astype(table_VE.dtype)

    if mesh is None:
        return add_up(rows_BNGR, gradient_BNTE), None
    batch = PartitionSpec(BATCH_AXES)
    total_VE = jax.shard_map(
        add_up, mesh=mesh, in_specs=(batch, batch), out_specs=PartitionSpec(None, "fsdp"), check_vma=False
    )(rows_BNGR, gradient_BNTE)
    return total_VE, None


_embed.defvjp(_save, _gradients)
