"""Attention: the implementations agree, and each honours causality, window, segments, grouped heads and positions."""

from __future__ import annotations

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from mimo_jax.config import ConfigError
from mimo_jax.kernels import flash_attention
from mimo_jax.models import attention as module
from mimo_jax.models.attention import attention, rope_tables, rotate
from mimo_jax.sharding import MESH_AXES


def _inputs(batch=2, length=40, heads=4, kv_heads=2, dim=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, length, heads, dim), (batch, length, kv_heads, dim), (batch, length, kv_heads, dim))
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def _segments(batch, length, seed=0):
    """Documents of uneven length, padding at the end (and, in row 0, in between)."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int32)
    for b in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, length - 4), 3, replace=False))
        for i, (start, stop) in enumerate(itertools.pairwise([0, *cuts, length - 3])):
            ids[b, start:stop] = i + 1
    ids[0, 5:7] = 0
    return jnp.asarray(ids)


def _reference(q, k, v, causal, window, segments):
    """Attention by loops over queries, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, L, N, H = q.shape
    left, right = window
    out = np.zeros(q.shape)
    for b, i, n in itertools.product(range(B), range(L), range(N)):
        keys = [
            j
            for j in range(k.shape[1])
            if (not causal or j <= i)
            and (left < 0 or j >= i - left)
            and (right < 0 or j <= i + right)
            and (segments is None or (segments[b, i] == segments[b, j] != 0))
        ]
        if keys:
            kv = n // (N // k.shape[2])
            scores = k[b, keys, kv] @ q[b, i, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, i, n] = weights @ v[b, keys, kv] / weights.sum()
    return out


CASES = list(itertools.product([True, False], [(-1, -1), (5, 0), (7, 3), (-1, 2), (4, -1)], [True, False]))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 queries, so that short rows go through every branch of the chunked path."""
    monkeypatch.setattr(module, "_MIN_BLOCK", 8)
    monkeypatch.setattr(module, "_BLOCK_SCORES", 8)


@pytest.mark.parametrize(("causal", "window", "packed"), CASES)
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_equals_loops_over_queries(small_blocks, impl, causal, window, packed):
    q, k, v = _inputs(length=37)
    segments = _segments(2, 37) if packed else None
    out = jax.jit(
        lambda q, k, v, ids: attention(
            q, k, v, causal=causal, window=window, q_segments_BL=ids, kv_segments_BS=ids, impl=impl
        )
    )(q, k, v, segments)
    expected = _reference(q, k, v, causal, window, None if segments is None else np.asarray(segments))
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("causal", "window", "packed"), [(True, (-1, -1), True), (False, (7, 3), True), (True, (5, 0), False)]
)
def test_chunked_gradients_equal_dense(small_blocks, causal, window, packed):
    with jax.enable_x64(True):
        q, k, v = _inputs(length=37, dtype=np.float64)
        segments = _segments(2, 37) if packed else None

        def loss(impl):
            def f(q, k, v):
                y = attention(
                    q, k, v, causal=causal, window=window, q_segments_BL=segments, kv_segments_BS=segments, impl=impl
                )
                return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

            return jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v)

        for a, b in zip(loss("dense"), loss("chunked"), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_padding_returns_zeros_and_finite_gradients(impl):
    q, k, v = _inputs(length=12)
    segments = jnp.zeros((2, 12), jnp.int32).at[1, :5].set(1)

    def f(q, k, v):
        return attention(q, k, v, causal=True, q_segments_BL=segments, kv_segments_BS=segments, impl=impl)

    out = f(q, k, v)
    assert not out[0].any() and not out[1, 5:].any() and out[1, :5].any()
    gradients = jax.grad(lambda *x: jnp.square(f(*x)).sum(), (0, 1, 2))(q, k, v)
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert not gradients[1][0].any()


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_positions_stand_for_the_index(small_blocks, impl):
    """Decoding compares given positions: 3 new queries at 17.. of 20 keys equal the last rows of the whole."""
    q, k, v = _inputs(length=20)
    whole = attention(q, k, v, causal=True, window=(6, 0), impl="dense")
    positions = jnp.broadcast_to(jnp.arange(17, 20), (2, 3))
    out = attention(
        q[:, 17:],
        k,
        v,
        causal=True,
        window=(6, 0),
        q_positions_BL=positions,
        kv_positions_BS=jnp.arange(20)[None],
        impl=impl,
    )
    np.testing.assert_allclose(out, whole[:, 17:], atol=1e-6)


def _temporary_bytes(length, impl, window):
    x = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def f(q, k, v, ids):
        y = attention(q, k, v, causal=True, window=window, q_segments_BL=ids, kv_segments_BS=ids, impl=impl)
        return jnp.square(y).sum()

    compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("window", [(-1, -1), (256, 0)])
def test_long_rows_never_hold_all_scores(window):
    scores = 8192 * 8192 * 4 * 4
    assert _temporary_bytes(8192, "auto", window) < scores / 8


@pytest.mark.parametrize(
    ("impl", "length", "causal", "window", "packed"),
    [
        ("splash", 256, True, (-1, 0), True),
        ("splash", 256, True, (40, 0), True),
        ("triton", 200, True, (-1, 0), True),  # several blocks, the last one filled up
        ("triton", 130, True, (40, 0), True),
        ("triton", 130, False, (7, 3), True),
        ("triton", 130, False, (-1, -1), False),
    ],
)
def test_kernels_equal_dense_in_interpret_mode(impl, length, causal, window, packed):
    q, k, v = _inputs(length=length, heads=6, kv_heads=2, dim=16)
    segments = _segments(2, length) if packed else None

    def dense(q, k, v):
        return attention(
            q, k, v, causal=causal, window=window, q_segments_BL=segments, kv_segments_BS=segments, impl="dense"
        )

    def kernel(q, k, v):
        return module._kernel(impl, q, k, v, window, segments, segments, interpret=True)

    def run(f):
        return jax.jit(jax.value_and_grad(lambda *x: (jnp.sin(y := f(*x)).sum(), y), (0, 1, 2), has_aux=True))(q, k, v)

    ((_, a), of_dense), ((_, b), of_kernel) = run(dense), run(kernel)
    np.testing.assert_allclose(a, b, atol=2e-6)
    assert segments is None or not b[segments == 0].any()
    for a, b in zip(of_kernel, of_dense, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_triton_leaves_out_blocks_that_nobody_sees():
    """Rows of 8 blocks: two documents of 4 blocks each, then (second row) only padding."""
    ids = jnp.stack([jnp.repeat(jnp.arange(1, 3), 64), jnp.zeros(128, jnp.int32)])
    needed = flash_attention._needed(ids, ids, 16, 16, (-1, 0))
    halves = np.kron(np.eye(2, dtype=bool), np.tril(np.ones((4, 4), bool)))
    np.testing.assert_array_equal(needed, [halves, np.zeros((8, 8), bool)])
    first, last = flash_attention._span(needed)
    np.testing.assert_array_equal(first, [[0, 0, 0, 0, 4, 4, 4, 4], [0] * 8])
    np.testing.assert_array_equal(last, [[1, 2, 3, 4, 5, 6, 7, 8], [0] * 8])
    near = flash_attention._needed(ids[:1], ids[:1], 16, 32, (16, 0))[0]
    np.testing.assert_array_equal(near.sum(1), [1, 1, 2, 1, 1, 1, 2, 1])


def _on_gpu(kind):
    """As if the program were for such a GPU. Nothing runs."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    types = (AxisType.Auto,) * len(MESH_AXES)
    return use_abstract_mesh(AbstractMesh((2, 2, 2), MESH_AXES, axis_types=types, abstract_device=device))


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_triton_lowers_for_gpus(kind):
    """The shapes of `7b`, forward and backward, on a mesh; three kernels. It says nothing about running them."""
    q, k = (jax.ShapeDtypeStruct((4, 8192, n, 128), jnp.bfloat16) for n in (32, 8))
    ids = jax.ShapeDtypeStruct((4, 8192), jnp.int32)

    def f(q, k, v, ids):
        return (
            attention(q, k, v, causal=True, q_segments_BL=ids, kv_segments_BS=ids, impl="triton")
            .astype(jnp.float32)
            .sum()
        )

    with _on_gpu(kind):
        text = jax.jit(jax.grad(f, (0, 1, 2))).trace(q, k, k, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3
    assert "8192x8192" not in text


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (None, {}, "no GPU"),
        ("Tesla T4", {}, "compute capability 7.5"),
        ("NVIDIA H200", {"dim": 24}, "heads of 24 dimensions"),
        ("NVIDIA H200", {"positions": True}, "explicit positions"),
        ("NVIDIA H200", {"heads": 3, "kv_heads": 1}, "mesh axis 'tensor' of size 2"),
    ],
)
def test_triton_refuses_what_it_cannot_honour(kind, change, message):
    q, k, v = _inputs(
        length=128, heads=change.get("heads", 4), kv_heads=change.get("kv_heads", 2), dim=change.get("dim", 16)
    )
    ids = jnp.ones((2, 128), jnp.int32)
    kwargs = {"q_positions_BL": ids, "kv_positions_BS": ids} if "positions" in change else {}

    def f(q, k, v):
        return attention(q, k, v, causal=True, impl="triton", **kwargs)

    with _on_gpu(kind) if kind else contextlib.nullcontext(), pytest.raises(ConfigError, match=message):
        jax.eval_shape(f, q, k, v)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "splash", "length": 100}, "multiple of 128"),
        ({"impl": "splash", "length": 128, "positions": True}, "explicit positions"),
        ({"impl": "flash", "length": 8}, "expected impl"),
        ({"impl": "dense", "length": 8, "one_sided": True}, "segments are needed"),
        ({"impl": "dense", "length": 8, "heads": 3}, "multiple of 2 key heads"),
    ],
)
def test_refuses_what_it_cannot_honour(change, message):
    q, k, v = _inputs(length=change["length"], heads=change.get("heads", 4))
    ids = jnp.ones((2, change["length"]), jnp.int32)
    kwargs = {"q_segments_BL": ids} if "one_sided" in change else {}
    if "positions" in change:
        kwargs = {"q_positions_BL": ids, "kv_positions_BS": ids}
    expected = ConfigError if change["impl"] == "splash" else ValueError  # the settings of a job can ask for splash
    with pytest.raises(expected, match=message):
        attention(q, k, v, causal=True, impl=change["impl"], **kwargs)


def test_rotation_depends_on_distance_only():
    with jax.enable_x64(True):
        q, k, _ = _inputs(batch=1, length=6, heads=1, kv_heads=1, dtype=np.float64)

        def scores(offset):
            tables = rope_tables(jnp.arange(6)[None] + offset, 8, 10_000.0, jnp.float64)
            return jnp.einsum("blnh,bsnh->ls", rotate(q, *tables), rotate(k, *tables))

        np.testing.assert_allclose(scores(0), scores(1000), rtol=1e-10)
        assert not np.allclose(scores(0), jnp.einsum("blnh,bsnh->ls", q, k))
