"""Cross-entropy under a linear head whose logits would be too large to exist at once.

The vocabulary is walked in chunks of columns. Each device gathers the rows of a chunk that others hold (`fsdp`), once
in the forward and once in the backward pass, and hands the chunk's gradient back to them at once: neither the logits,
nor the whole head, nor its gradient ever exist on a device.

Axes: B rows, L positions, X = B * L on a device, D width, V vocabulary, C columns of a chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mimo_jax.sharding import BATCH_AXES, mesh_that_divides

_LANES = 128  # of a TPU register: chunks are multiples of it


def cross_entropy(
    h_BLD: jax.Array, kernel_DV: jax.Array, targets_BL: jax.Array, logits_chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every position.

    Args:
        h_BLD: hidden states; their dtype is that of the matrix products, which accumulate in float32.
        kernel_DV: kernel of the head, in the dtype of the parameters. Under a mesh D is cut over `fsdp`, V over
            `tensor`.
        targets_BL: int32 target ids.
        logits_chunk: logits that exist at once on a device, at least those of one column, or of 128 where there are as
            many.

    Returns:
        Cross-entropy in nats [B, L], float32 (float64 for float64), and whether the target is the best guess.
    """
    ce_BL, correct_BL, _ = _cross_entropy(h_BLD, kernel_DV, targets_BL, logits_chunk)
    return ce_BL, correct_BL


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(h_BLD, kernel_DV, targets_BL, logits_chunk: int):
    return _sharded(_forward, logits_chunk, h_BLD, kernel_DV, targets_BL)


def _save(h_BLD, kernel_DV, targets_BL, logits_chunk: int):
    out = _cross_entropy(h_BLD, kernel_DV, targets_BL, logits_chunk)
    return out, (h_BLD, kernel_DV, targets_BL, out[2])


def _gradients(logits_chunk: int, saved, cotangents):
    return *_sharded(_backward, logits_chunk, *saved, cotangents[0]), None


_cross_entropy.defvjp(_save, _gradients)


def _sharded(body: Any, logits_chunk: int, h_BLD, kernel_DV, *of_rows):
    """Runs `body` on each device's part, if a mesh is set that divides the arrays; else on all at once."""
    mesh = mesh_that_divides(batch=h_BLD.shape[0], fsdp=kernel_DV.shape[0], tensor=kernel_DV.shape[1])
    rows, head = PartitionSpec(BATCH_AXES), PartitionSpec("fsdp", "tensor")
    if mesh is None:
        return body(h_BLD, kernel_DV, *of_rows, logits_chunk=logits_chunk, local=True)
    return jax.shard_map(
        functools.partial(body, logits_chunk=logits_chunk, local=False),
        mesh=mesh,
        in_specs=(rows, head) + (rows,) * len(of_rows),
        out_specs=(rows, rows, rows) if body is _forward else (rows, head),
        check_vma=False,
    )(h_BLD, kernel_DV, *of_rows)


def columns_at_once(positions: int, columns: int, logits_chunk: int) -> int:
    """Columns of a chunk on a device with so many positions and columns."""
    size = max(1, logits_chunk // max(1, positions))
    return min(columns, max(_LANES, size // _LANES * _LANES) if columns > _LANES else size)


class _Columns:
    """The columns of the head, a chunk at a time.

    The last chunk begins early where the chunks do not add up; what it repeats counts as absent.
    """

    def __init__(self, h_XD: jax.Array, kernel_DV: jax.Array, logits_chunk: int, local: bool) -> None:
        self.h_XD, self.kernel_DV, self.local = h_XD, kernel_DV, local
        columns = kernel_DV.shape[1]
        self.size = columns_at_once(h_XD.shape[0], columns, logits_chunk)
        self.wide = jnp.promote_types(h_XD.dtype, jnp.float32)
        self.starts = self.size * jnp.arange(-(-columns // self.size))
        self.first_id = 0 if local else jax.lax.axis_index("tensor") * columns

    def chunk(self, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Where a chunk begins, its kernel [D, C], its ids [C] (-1: repeated), its logits [X, C] (-inf: repeated)."""
        at = jnp.minimum(start, self.kernel_DV.shape[1] - self.size)
        kernel_DC = jax.lax.dynamic_slice_in_dim(self.kernel_DV, at, self.size, 1).astype(self.h_XD.dtype)
        if not self.local:
            kernel_DC = jax.lax.all_gather(kernel_DC, "fsdp", axis=0, tiled=True)
        index_C = at + jnp.arange(self.size)
        logits_XC = jnp.matmul(self.h_XD, kernel_DC, preferred_element_type=self.wide)
        logits_XC = jnp.where(index_C >= start, logits_XC, -jnp.inf)
        return at, kernel_DC, jnp.where(index_C >= start, index_C + self.first_id, -1), logits_XC


def _forward(h_BLD, kernel_DV, targets_BL, *, logits_chunk: int, local: bool):
    """Cross-entropy, whether the target is the best guess, and the logarithm of the partition sum, all [B, L]."""
    columns = _Columns(h_BLD.reshape(-1, h_BLD.shape[-1]), kernel_DV, logits_chunk, local)
    targets_X = targets_BL.reshape(-1)

    def step(carry, start):
        top_X, total_X, target_X = carry
        _, _, ids_C, logits_XC = columns.chunk(start)
        new_top_X = jnp.maximum(top_X, logits_XC.max(-1))
        total_X = total_X * jnp.exp(top_X - new_top_X) + jnp.exp(logits_XC - new_top_X[:, None]).sum(-1)
        target_X += jnp.where(ids_C == targets_X[:, None], logits_XC, 0).sum(-1)
        return (new_top_X, total_X, target_X), None

    zeros_X = jnp.zeros(targets_X.shape, columns.wide)
    (top_X, total_X, target_X), _ = jax.lax.scan(step, (zeros_X - jnp.inf, zeros_X, zeros_X), columns.starts)
    if not local:
        best_X = jax.lax.pmax(top_X, "tensor")
        total_X = jax.lax.psum(total_X * jnp.exp(top_X - best_X), "tensor")
        top_X, target_X = best_X, jax.lax.psum(target_X, "tensor")
    log_total_X = jnp.log(total_X) + top_X
    out = (log_total_X - target_X, target_X >= top_X, log_total_X)
    return tuple(x.reshape(targets_BL.shape) for x in out)


def _backward(h_BLD, kernel_DV, targets_BL, log_total_BL, cotangent_BL, *, logits_chunk: int, local: bool):
    """Gradients of hidden states and kernel, in their dtypes; sums are wide."""
    h_XD = h_BLD.reshape(-1, h_BLD.shape[-1])
    columns = _Columns(h_XD, kernel_DV, logits_chunk, local)
    targets_X1, log_total_X1, cotangent_X1 = (x.reshape(-1, 1) for x in (targets_BL, log_total_BL, cotangent_BL))

    def step(carry, start):
        dh_XD, dkernel_DV = carry
        at, kernel_DC, ids_C, logits_XC = columns.chunk(start)
        dlogits_XC = jnp.exp(logits_XC - log_total_X1) - (ids_C == targets_X1)
        dlogits_XC = (dlogits_XC * cotangent_X1).astype(h_XD.dtype)
        dh_XD += jnp.matmul(dlogits_XC, kernel_DC.T, preferred_element_type=columns.wide)
        new_DC = jnp.matmul(h_XD.T, dlogits_XC, preferred_element_type=columns.wide)
        if not local:
            new_DC = jax.lax.psum_scatter(new_DC, "fsdp", scatter_dimension=0, tiled=True)
        old_DC = jax.lax.dynamic_slice_in_dim(dkernel_DV, at, columns.size, 1)
        return (dh_XD, jax.lax.dynamic_update_slice_in_dim(dkernel_DV, old_DC + new_DC, at, 1)), None

    start = (jnp.zeros(h_XD.shape, columns.wide), jnp.zeros(kernel_DV.shape, columns.wide))
    (dh_XD, dkernel_DV), _ = jax.lax.scan(step, start, columns.starts)
    if not local:
        dh_XD, dkernel_DV = jax.lax.psum(dh_XD, "tensor"), jax.lax.psum(dkernel_DV, "data")
    return dh_XD.reshape(h_BLD.shape).astype(h_BLD.dtype), dkernel_DV.astype(kernel_DV.dtype)
