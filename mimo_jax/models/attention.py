"""Attention, in one place: every stack of the system calls `attention` and says what may attend to what.

Implementations, each of which honours causality, window, segments and grouped heads, or raises:
    dense: all scores at once; for short rows.
    chunked: a scan over blocks of queries, each recomputed in the backward pass, so that no [L, S] array exists; a
        finite window reads only the keys around the block, and causal rows leave out most of the keys in the future.
    splash: the Pallas TPU kernel of jax.
    triton: the Pallas GPU kernels of `mimo_jax.kernels.flash_attention`.

Axes: B batch, L query positions, S key positions, N query heads, K key/value heads, G query heads of a key head, H head
dimension, C queries of a block.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mimo_jax.config import ConfigError
from mimo_jax.sharding import BATCH_AXES, current_mesh

Implementation = Literal["auto", "dense", "chunked", "splash", "triton"]
KERNELS = ("splash", "triton")  # for whole rows on one kind of device
Window = tuple[int, int]

# `auto` keeps rows dense up to this many scores per head, unless a window leaves most of them unread.
DENSE_SCORES = 4 * 512 * 512
# A block of the chunked path holds about this many scores per head.
_BLOCK_SCORES = 512 * 1024
_MIN_BLOCK = 128
# The chunked path cuts causal rows into this many parts; each reads the keys up to its own end, 5/8 of all.
_CAUSAL_PARTS = 4
# The lane count of a TPU register: splash works on multiples of it.
_LANES = 128


def attention(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    window: Window = (-1, -1),
    q_segments_BL: jax.Array | None = None,
    kv_segments_BS: jax.Array | None = None,
    q_positions_BL: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    impl: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped heads.

    Args:
        q_BLNH: queries.
        k_BSKH: keys; K divides N, and query head n reads key head n // (N / K).
        v_BSKH: values.
        causal: a query sees keys at its own position and before.
        window: (left, right): a query at position i sees keys at i - left .. i + right, ends included; -1 is unlimited.
        q_segments_BL: int32 document of each query; only equal ids that are not 0 attend. A query of segment 0
            (padding) returns zeros, as does one that sees no key.
        kv_segments_BS: int32 document of each key; given if and only if `q_segments_BL` is.
        q_positions_BL: int32 positions that causality and window compare; by default the index in the row.
        kv_positions_BS: the same for the keys; given if and only if `q_positions_BL` is.
        impl: implementation; `auto` takes splash on TPU where it can, else dense for short rows and chunked for long.
            It leaves triton alone, which has been compiled for GPUs but not yet run on one.

    Returns:
        [B, L, N, H] in the dtype of the queries. Softmax is float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit together, only one of a pair is given, or (ConfigError) `impl` cannot honour an
            argument.
    """
    _check(q_BLNH, k_BSKH, v_BSKH, q_segments_BL, kv_segments_BS, q_positions_BL, kv_positions_BS)
    if causal:
        window = (window[0], 0)
    L, S = q_BLNH.shape[1], k_BSKH.shape[1]
    if impl == "auto":
        positions = q_positions_BL is not None
        if jax.default_backend() == "tpu" and _splash_obstacle(q_BLNH, k_BSKH, positions) is None:
            impl = "splash"
        else:
            local = not positions and min(window) >= 0 and 2 * (_MIN_BLOCK + sum(window)) < S
            impl = "chunked" if local or L * S > DENSE_SCORES else "dense"
    if impl in KERNELS:
        check = _splash_obstacle if impl == "splash" else _triton_obstacle
        obstacle = check(q_BLNH, k_BSKH, q_positions_BL is not None)
        if obstacle:
            raise ConfigError(f"attention: {impl} cannot honour {obstacle}")
        return _kernel(impl, q_BLNH, k_BSKH, v_BSKH, window, q_segments_BL, kv_segments_BS)
    if impl == "chunked":
        return _chunked(q_BLNH, k_BSKH, v_BSKH, window, q_segments_BL, kv_segments_BS, q_positions_BL, kv_positions_BS)
    if impl != "dense":
        raise ValueError(f"attention: expected impl auto, dense, chunked, splash or triton, got {impl!r}")
    if q_positions_BL is None or kv_positions_BS is None:
        q_positions_BL, kv_positions_BS = jnp.arange(L)[None], jnp.arange(S)[None]
    mask_BLS = _mask(window, q_positions_BL, kv_positions_BS, q_segments_BL, kv_segments_BS)
    return _attend(q_BLNH, k_BSKH, v_BSKH, mask_BLS)


def _check(q, k, v, q_segments, kv_segments, q_positions, kv_positions) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q [B,L,N,H], k and v [B,S,K,H] do not fit: {q.shape}, {k.shape}, {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    for name, of_q, of_k in (("segments", q_segments, kv_segments), ("positions", q_positions, kv_positions)):
        if (of_q is None) != (of_k is None):
            raise ValueError(f"attention: {name} are needed for queries and keys, or for neither")
        if of_q is not None and (of_q.shape[-1] != q.shape[1] or of_k.shape[-1] != k.shape[1]):
            raise ValueError(f"attention: {name} {of_q.shape}, {of_k.shape} do not fit q {q.shape}, k {k.shape}")


def _mask(window: Window, q_positions, kv_positions, q_segments, kv_segments) -> jax.Array | None:
    """Which key each query sees: bool [B or 1, L, S], or None when it sees all."""
    left, right = window
    mask = None
    if left >= 0 or right >= 0:
        distance = kv_positions[:, None, :] - q_positions[:, :, None]
        mask = jnp.ones(distance.shape, bool)
        if left >= 0:
            mask &= distance >= -left
        if right >= 0:
            mask &= distance <= right
    if q_segments is not None:
        same = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
        mask = same if mask is None else mask & same
    return mask


def _attend(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BLS: jax.Array | None) -> jax.Array:
    """Attention with an explicit mask. A query that sees nothing returns zeros, and gradients stay finite."""
    B, L, N, H = q_BLNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    wide = jnp.promote_types(q_BLNH.dtype, jnp.float32)
    # As plain batched products of matrices: XLA CPU takes three times as long for the gradients of anything else.
    q_BKMH = q_BLNH.reshape(B, L, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * L, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    scores_BKMS = jnp.einsum("bkmh,bksh->bkms", q_BKMH, k_BKSH, preferred_element_type=wide)
    scores = scores_BKMS.reshape(B, K, G, L, S) * (1 / math.sqrt(H))
    if mask_BLS is not None:
        scores = jnp.where(mask_BLS[:, None, None], scores, jnp.finfo(wide).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    out_BKMH = jnp.einsum("bkms,bksh->bkmh", probs.reshape(B, K, G * L, S), v_BKSH)
    out = out_BKMH.reshape(B, K, G, L, H).transpose(0, 3, 1, 2, 4)
    if mask_BLS is not None:
        out = jnp.where(mask_BLS.any(-1)[:, :, None, None, None], out, 0)
    return out.reshape(B, L, N, H).astype(q_BLNH.dtype)


def _chunked(q, k, v, window: Window, q_segments, kv_segments, q_positions, kv_positions) -> jax.Array:
    L, S = q.shape[1], k.shape[1]
    left, right = window
    by_index = q_positions is None
    if by_index and left >= 0 and right >= 0:
        block = max(_MIN_BLOCK, left + right)
        return _scan_blocks(q, k, v, window, q_segments, kv_segments, q_positions, kv_positions, 0, min(block, L))
    block = min(L, max(_MIN_BLOCK, _BLOCK_SCORES // S // _MIN_BLOCK * _MIN_BLOCK))
    num_blocks = -(-L // block)
    if not (by_index and right == 0 and L == S and num_blocks >= _CAUSAL_PARTS):
        return _scan_blocks(q, k, v, window, q_segments, kv_segments, q_positions, kv_positions, 0, block)
    outs = []
    for part in range(_CAUSAL_PARTS):
        start, stop = (min(L, num_blocks * p // _CAUSAL_PARTS * block) for p in (part, part + 1))
        cut = None if q_segments is None else q_segments[:, start:stop]
        keys = None if kv_segments is None else kv_segments[:, :stop]
        outs.append(
            _scan_blocks(q[:, start:stop], k[:, :stop], v[:, :stop], window, cut, keys, None, None, start, block)
        )
    return jnp.concatenate(outs, axis=1)


def _scan_blocks(q, k, v, window: Window, q_segments, kv_segments, q_positions, kv_positions, offset: int, block: int):
    """Scans over blocks of queries; the first query stands at index `offset` of the row."""
    B, L, N, H = q.shape
    S = k.shape[1]
    left, right = window
    num_blocks = -(-L // block)
    pad = num_blocks * block - L
    local = q_positions is None and left >= 0 and right >= 0
    if local:
        # Block i reads keys [i * block - left, (i + 1) * block + right); with padding on both sides they always exist.
        after = max(0, num_blocks * block + right - S)
        k, v = (jnp.pad(x, ((0, 0), (left, after), (0, 0), (0, 0))) for x in (k, v))
        if kv_segments is not None:
            kv_segments = jnp.pad(kv_segments, ((0, 0), (left, after)))

    def blocks(x: jax.Array | None) -> jax.Array | None:
        """[B, L, ...] -> [blocks, B, block, ...], padded with zeros (segment 0)."""
        if x is None:
            return None
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, block, *x.shape[2:]), 1, 0)

    def attend(start, q, q_segments, q_positions):
        keys, values, segments = k, v, kv_segments
        if q_positions is None:
            q_positions, positions = (start + jnp.arange(block))[None], jnp.arange(S)[None]
        else:
            positions = kv_positions
        if local:
            size = block + left + right
            keys, values = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (k, v))
            segments = None if segments is None else jax.lax.dynamic_slice_in_dim(segments, start, size, axis=1)
            positions = (start - left + jnp.arange(size))[None]
        mask = _mask(window, q_positions, positions, q_segments, segments)
        if local and mask is not None:
            mask &= ((positions >= 0) & (positions < S))[:, None, :]
        return _attend(q, keys, values, mask)

    starts = offset + block * jnp.arange(num_blocks)
    # Recomputing each block in the backward pass is what keeps the memory at one block of scores.
    attend = jax.checkpoint(attend, prevent_cse=False)
    _, out = jax.lax.scan(
        lambda _, xs: (None, attend(*xs)), None, (starts, blocks(q), blocks(q_segments), blocks(q_positions))
    )
    return jnp.moveaxis(out, 0, 1).reshape(B, num_blocks * block, N, H)[:, :L]


def _splash_obstacle(q: jax.Array, k: jax.Array, positions: bool) -> str | None:
    """What splash cannot honour, or None."""
    if positions:
        return "explicit positions"
    if q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries on {k.shape[1]} keys"
    if q.shape[1] % _LANES:
        return f"a row of {q.shape[1]} positions (not a multiple of {_LANES})"
    if q.dtype == jnp.float64:
        return "float64"
    return None


def _triton_obstacle(q: jax.Array, k: jax.Array, positions: bool) -> str | None:
    """What the GPU kernels cannot honour, or None."""
    from mimo_jax.kernels.flash_attention import obstacle

    return "explicit positions" if positions else obstacle(q, k)


def _kernel(impl: str, q, k, v, window: Window, q_segments, kv_segments, interpret: bool = False) -> jax.Array:
    """A kernel, under `jax.shard_map` when a mesh is set: batch over data and fsdp, heads over tensor."""
    segments = q_segments is not None
    arrays = (q, k, v) + ((q_segments, kv_segments) if segments else ())
    body = functools.partial(_splash if impl == "splash" else _triton, window=window, interpret=interpret)
    mesh = current_mesh()
    if mesh is not None:
        if q.shape[2] % mesh.shape["tensor"] or k.shape[2] % mesh.shape["tensor"]:
            raise ConfigError(
                f"attention: {impl} cannot honour {q.shape[2]} query and {k.shape[2]} key heads over "
                f"mesh axis 'tensor' of size {mesh.shape['tensor']}"
            )
        heads, rows = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES, None)
        specs = (heads, heads, heads) + ((rows, rows) if segments else ())
        body = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return body(*arrays)


def _triton(q, k, v, q_segments=None, kv_segments=None, *, window: Window, interpret: bool) -> jax.Array:
    from mimo_jax.kernels.flash_attention import flash_attention

    return flash_attention(q, k, v, q_segments, kv_segments, window=window, interpret=interpret)


def _splash(q, k, v, q_segments=None, kv_segments=None, *, window: Window, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    L, N = q.shape[1], q.shape[2]
    q = q * jnp.asarray(1 / math.sqrt(q.shape[3]), q.dtype)
    left, right = (None if w < 0 else w for w in window)
    if left is None and right is None:
        mask: masks.Mask = masks.FullMask((L, L))
    elif left is None and right == 0:
        mask = masks.CausalMask((L, L))
    else:
        mask = masks.LocalMask((L, L), window_size=(left, right), offset=0)
    block = next(b for b in (1024, 512, 256, 128) if L % b == 0)
    sizes: Any = {f"block_{name}": block for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    sizes |= dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), min(block, 512))
    sizes, heads = splash.BlockSizes(**sizes), masks.MultiHeadMask([mask] * N)
    kernel = splash.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    segments = None if q_segments is None else splash.SegmentIds(q=q_segments, kv=kv_segments)
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q, k, v, segments)
    out = jnp.swapaxes(out, 1, 2).astype(q.dtype)
    # The kernel lets padding attend to padding.
    return out if q_segments is None else jnp.where((q_segments != 0)[:, :, None, None], out, 0)


def rope_tables(positions_BL: jax.Array, head_dim: int, theta: float, dtype) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary embedding: two arrays [B or 1, L, 1, H / 2], of frequencies theta^(-2i / H).

    `head_dim` H is even; `dtype` is float32 or float64, whatever the activations are.
    """
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    angles = positions_BL[:, :, None, None].astype(dtype) * jnp.asarray(frequencies, dtype)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of the half-rotation kind (dimension i pairs with i + H / 2), computed in the tables' dtype."""
    a, b = jnp.split(x_BLNH.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLNH.dtype)
