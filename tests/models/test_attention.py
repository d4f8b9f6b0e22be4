"""Attention: the implementations agree, and each honours causality, window, segments, grouped heads and positions."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config import ConfigError
from mimo_jax.models import attention as module
from mimo_jax.models.attention import attention, rope_tables, rotate


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


def test_splash_equals_dense_in_interpret_mode():
    q, k, v = _inputs(batch=1, length=256, heads=4, kv_heads=2, dim=16)
    segments = _segments(1, 256)
    for window in ((-1, 0), (40, 0)):

        def dense(q, k, v, window=window):
            return attention(
                q, k, v, causal=True, window=window, q_segments_BL=segments, kv_segments_BS=segments, impl="dense"
            )

        def splash(q, k, v, window=window):
            return module._splash(q, k, v, window, segments, segments, interpret=True)

        def run(f):
            return jax.jit(jax.value_and_grad(lambda *x: (jnp.sin(y := f(*x)).sum(), y), (0, 1, 2), has_aux=True))(
                q, k, v
            )

        ((_, a), of_dense), ((_, b), of_splash) = run(dense), run(splash)
        np.testing.assert_allclose(a, b, atol=2e-6)
        for a, b in zip(of_splash, of_dense, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-6)


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
