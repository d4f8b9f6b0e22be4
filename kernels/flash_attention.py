"""Attention as one pass over blocks of keys, for GPUs: Pallas, compiled by Triton. No array of scores leaves a kernel.

Reference: `mimo_jax.models.attention` with impl="dense"; on TPU the splash kernel of JAX is used. JAX has a kernel of
this kind for GPUs (`pallas.ops.gpu.attention`, deprecated), without grouped heads, windows, rows of any length and
blocks left out. The Triton backend of Pallas is itself to leave JAX some time after 0.12.

Sources: Dao, FlashAttention-2, arXiv:2307.08691 (the algorithm, and what the backward pass keeps).

Axes: B batch, L query positions, S key positions, N query heads, K key heads, G query heads of a key head, H head
dimension; I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_HEAD_DIMS = (16, 32, 64, 128)  # what a tile may be: powers of two, as wide as a tensor core at least
_HIDDEN = -1e30
_LOG2E = math.log2(math.e)


def obstacle(q: jax.ShapeDtypeStruct | jax.Array, k: jax.ShapeDtypeStruct | jax.Array) -> str | None:
    """What the kernels cannot honour on the present device (or abstract device), or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or k.dtype != q.dtype:
        return f"{q.dtype} queries and {k.dtype} keys"
    if q.shape[-1] not in _HEAD_DIMS:
        return f"heads of {q.shape[-1]} dimensions (not one of {', '.join(map(str, _HEAD_DIMS))})"
    if not plt.is_gpu_device():
        return "a device that is no GPU"
    try:
        capability = plt.get_gpu_info().compute_capability
    except ValueError as error:
        return f"this GPU ({error})"
    return None if capability >= 80 else f"a GPU of compute capability {capability / 10} (below 8.0)"


def flash_attention(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_ids_BL: jax.Array | None,
    k_ids_BS: jax.Array | None,
    *,
    window: tuple[int, int],
    interpret: bool = False,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads; the arguments are those of `mimo_jax.models.attention`.

    Args:
        q_BLNH: queries, bfloat16, float16 or float32; H is 16, 32, 64 or 128.
        k_BSKH: keys; K divides N.
        v_BSKH: values.
        q_ids_BL: int32 document of each query, 0 is padding; or None.
        k_ids_BS: the same for the keys; given if and only if `q_ids_BL` is.
        window: (left, right) by index in the row; -1 is unlimited, right = 0 is causal.
        interpret: runs on any device, slowly.

    Returns:
        [B, L, N, H] in the dtype of the queries; zeros where a query is padding or sees no key. Blocks of keys that no
        query of a block can see, because of the window or the documents, are not read.
    """
    B, L, S = q_BLNH.shape[0], q_BLNH.shape[1], k_BSKH.shape[1]
    if q_ids_BL is None or k_ids_BS is None:
        q_ids_BL, k_ids_BS = jnp.ones((B, L), jnp.int32), jnp.ones((B, S), jnp.int32)
    block = max(_blocks(q_BLNH.dtype))
    q, q_ids = (_pad(x, block) for x in (q_BLNH, q_ids_BL))
    k, v, k_ids = (_pad(x, block) for x in (k_BSKH, v_BSKH, k_ids_BS))
    return _attend(q, k, v, q_ids, k_ids, window, interpret)[:, :L]


def _blocks(dtype: jnp.dtype) -> tuple[int, int, int]:
    """Positions of a tile: (those a program owns, those it walks over forward, and backward), to fit shared memory."""
    return (64, 32, 32) if dtype == jnp.float32 else (128, 64, 32)


def _pad(x: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))


def _needed(q_ids, k_ids, own: int, other: int, window: tuple[int, int]) -> jax.Array:
    """Whether some query of block I may see some key of block J: bool [B, I, J]."""
    ends = []
    for ids, block in ((q_ids, own), (k_ids, other)):
        ids = ids.reshape(ids.shape[0], -1, block)
        limit = jnp.iinfo(ids.dtype)
        low = jnp.where(ids != 0, ids, limit.max).min(-1)
        ends.append((low, jnp.where(ids != 0, ids, limit.min).max(-1), block * jnp.arange(ids.shape[1])))
    (q_low, q_high, q_at), (k_low, k_high, k_at) = ends
    needed = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    left, right = window
    if left >= 0:
        needed &= k_at[None] + other - 1 - q_at[:, None] >= -left
    if right >= 0:
        needed &= k_at[None] - (q_at[:, None] + own - 1) <= right
    return needed


def _span(needed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First True of the last axis, and one past the last: int32; (0, 0) where there is none."""
    first, last = needed.argmax(-1), needed.shape[-1] - needed[..., ::-1].argmax(-1)
    return first.astype(jnp.int32), jnp.where(needed.any(-1), last, 0).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, q_ids, k_ids, window: tuple[int, int], interpret: bool) -> jax.Array:
    return _forward(q, k, v, q_ids, k_ids, window, interpret)[0]


def _forward(q, k, v, q_ids, k_ids, window: tuple[int, int], interpret: bool):
    (B, L, N, H), (S, K) = q.shape, k.shape[1:3]
    own, other, _ = _blocks(q.dtype)
    first, last = _span(_needed(q_ids, k_ids, own, other, window))
    tile = pl.BlockSpec((None, own, None, H), lambda i, b, n: (b, i, n, 0))
    whole = pl.BlockSpec((None, S, None, H), lambda i, b, n: (b, 0, n * K // N, 0))
    bound = pl.BlockSpec((None, None), lambda i, b, n: (b, i))
    out, logs = pl.pallas_call(
        functools.partial(_forward_kernel, block=other, window=window),
        grid=(L // own, B, N),
        in_specs=[
            *(tile, whole, whole),
            pl.BlockSpec((None, own), lambda i, b, n: (b, i)),
            pl.BlockSpec((None, S), lambda i, b, n: (b, 0)),
            *(bound, bound),
        ],
        out_specs=[tile, pl.BlockSpec((None, None, own), lambda i, b, n: (b, n, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, L), jnp.float32)],
        compiler_params=_params(H),
        interpret=interpret,
    )(q, k, v, q_ids, k_ids, first, last)
    return out, (q, k, v, q_ids, k_ids, out, logs)


def _backward(window: tuple[int, int], interpret: bool, kept, d_out):
    q, k, v, q_ids, k_ids, out, logs = kept
    (B, L, N, H), (S, K) = q.shape, k.shape[1:3]
    G, (own, _, other) = N // K, _blocks(q.dtype)
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)

    first, last = _span(_needed(q_ids, k_ids, own, other, window))
    tile = pl.BlockSpec((None, own, None, H), lambda i, b, n: (b, i, n, 0))
    whole = pl.BlockSpec((None, S, None, H), lambda i, b, n: (b, 0, n * K // N, 0))
    row = pl.BlockSpec((None, None, own), lambda i, b, n: (b, n, i))
    bound = pl.BlockSpec((None, None), lambda i, b, n: (b, i))
    q_tile_ids = pl.BlockSpec((None, own), lambda i, b, n: (b, i))
    k_whole_ids = pl.BlockSpec((None, S), lambda i, b, n: (b, 0))
    dq = pl.pallas_call(
        functools.partial(_dq_kernel, block=other, window=window),
        grid=(L // own, B, N),
        in_specs=[tile, whole, whole, q_tile_ids, k_whole_ids, tile, row, row, bound, bound],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_params(H),
        interpret=interpret,
    )(q, k, v, q_ids, k_ids, d_out, logs, delta, first, last)

    first, last = _span(_needed(q_ids, k_ids, other, own, window).swapaxes(1, 2))
    tile = pl.BlockSpec((None, own, None, H), lambda j, b, n: (b, j, n, 0))
    whole = pl.BlockSpec((None, L, G, H), lambda j, b, n: (b, 0, n, 0))
    row = pl.BlockSpec((None, G, L), lambda j, b, n: (b, n, 0))
    bound = pl.BlockSpec((None, None), lambda j, b, n: (b, j))
    q_whole_ids = pl.BlockSpec((None, L), lambda j, b, n: (b, 0))
    k_tile_ids = pl.BlockSpec((None, own), lambda j, b, n: (b, j))
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, block=other, window=window),
        grid=(S // own, B, K),
        in_specs=[whole, tile, tile, q_whole_ids, k_tile_ids, whole, row, row, bound, bound],
        out_specs=[tile, tile],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=_params(H),
        interpret=interpret,
    )(q, k, v, q_ids, k_ids, d_out, logs, delta, first, last)
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _params(H: int) -> plt.CompilerParams:
    # A float32 sum of 128 x 128 takes half the registers of 8 warps.
    return plt.CompilerParams(num_warps=4 if H <= 64 else 8, num_stages=2)


def _visible(q_ids, k_ids, q_at, k_at, window: tuple[int, int]) -> jax.Array:
    """Which key each query sees, from documents and indices, either way round: [M, 1] and [1, N] give bool [M, N]."""
    mask = (q_ids == k_ids) & (q_ids != 0)
    distance = k_at - q_at
    left, right = window
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def _forward_kernel(
    q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, first_ref, last_ref, out_ref, logs_ref, *, block, window
):
    """One block of queries of a head: running maximum, sum and weighted values over the blocks of keys."""
    own, H = q_ref.shape
    q, q_ids, q_at = q_ref[...], q_ids_ref[...], pl.program_id(0) * own + jnp.arange(own)
    scale = _LOG2E / math.sqrt(H)

    def body(j, carry):
        out, top, total = carry
        keys = pl.ds(j * block, block)
        v, k_at = v_ref[keys, :], j * block + jnp.arange(block)
        visible = _visible(q_ids[:, None], k_ids_ref[keys][None], q_at[:, None], k_at[None], window)
        scores = jnp.where(visible, plt.dot(q, k_ref[keys, :].T) * scale, _HIDDEN)
        new = jnp.maximum(top, scores.max(-1))
        # A query that has seen nothing yet has all its scores at the maximum.
        probs = jnp.where(visible, jnp.exp2(scores - new[:, None]), 0.0)
        fade = jnp.exp2(top - new)
        return out * fade[:, None] + plt.dot(probs.astype(v.dtype), v), new, total * fade + probs.sum(-1)

    start = (jnp.zeros((own, H), jnp.float32), jnp.full((own,), _HIDDEN, jnp.float32), jnp.zeros((own,), jnp.float32))
    out, top, total = jax.lax.fori_loop(first_ref[...], last_ref[...], body, start)
    total = jnp.where(total == 0, 1.0, total)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    logs_ref[...] = top + jnp.log2(total)


def _tile(x, y, dx, dy, logs, delta, visible) -> tuple[jax.Array, jax.Array]:
    """Probabilities of a tile and the gradient of its scores (before scaling), both float32 [M, N].

    The program's own block is the rows (x [M, H]), so that they fill a tensor core: queries for dq, keys for dk and dv.
    """
    scores = plt.dot(x, y.T) * (_LOG2E / math.sqrt(x.shape[1]))
    probs = jnp.where(visible, jnp.exp2(jnp.where(visible, scores - logs, 0.0)), 0.0)
    return probs, probs * (plt.dot(dx, dy.T) - delta)


def _dq_kernel(q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, d_out_ref, logs_ref, delta_ref, *refs, block, window):
    first_ref, last_ref, dq_ref = refs
    own, H = q_ref.shape
    q, d_out = q_ref[...], d_out_ref[...]
    q_ids, logs, delta = (x[...][:, None] for x in (q_ids_ref, logs_ref, delta_ref))
    q_at = (pl.program_id(0) * own + jnp.arange(own))[:, None]

    def body(j, dq):
        keys = pl.ds(j * block, block)
        k, k_at = k_ref[keys, :], (j * block + jnp.arange(block))[None]
        visible = _visible(q_ids, k_ids_ref[keys][None], q_at, k_at, window)
        _, d_scores = _tile(q, k, d_out, v_ref[keys, :], logs, delta, visible)
        return dq + plt.dot(d_scores.astype(k.dtype), k)

    dq = jax.lax.fori_loop(first_ref[...], last_ref[...], body, jnp.zeros((own, H), jnp.float32))
    dq_ref[...] = (dq / math.sqrt(H)).astype(dq_ref.dtype)


def _dkv_kernel(q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, d_out_ref, logs_ref, delta_ref, *refs, block, window):
    """One block of a key head: its gradients summed over the query heads of the group and the blocks of queries."""
    first_ref, last_ref, dk_ref, dv_ref = refs
    own, H = k_ref.shape
    k, v, k_ids = k_ref[...], v_ref[...], k_ids_ref[...][:, None]
    k_at = (pl.program_id(0) * own + jnp.arange(own))[:, None]
    first, last = first_ref[...], last_ref[...]

    def head(g, carry):
        def body(i, carry):
            dk, dv = carry
            rows = pl.ds(i * block, block)
            q, d_out, q_at = q_ref[rows, g, :], d_out_ref[rows, g, :], (i * block + jnp.arange(block))[None]
            visible = _visible(q_ids_ref[rows][None], k_ids, q_at, k_at, window)
            probs, d_scores = _tile(k, q, v, d_out, logs_ref[g, rows][None], delta_ref[g, rows][None], visible)
            return dk + plt.dot(d_scores.astype(q.dtype), q), dv + plt.dot(probs.astype(d_out.dtype), d_out)

        return jax.lax.fori_loop(first, last, body, carry)

    zeros = jnp.zeros((own, H), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
    dk_ref[...] = (dk / math.sqrt(H)).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
