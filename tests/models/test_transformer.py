"""Transformer blocks: cached = whole, scanned = unrolled, remat changes no gradient, packed = alone."""

from __future__ import annotations

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config import ComputeConfig, ConfigError, TransformerConfig
from mimo_jax.models.transformer import KVCache, Transformer, initializer, unstack_layers

QWEN = TransformerConfig.qwen2(d_model=16, num_layers=3, num_heads=4, head_dim=4, d_ff=32, num_kv_heads=2)
CODEC = TransformerConfig.codec(d_model=16, num_layers=2, num_heads=4, d_ff=32, causal=False, window=(3, 2))
COMPUTE = ComputeConfig()


@functools.cache
def _params(config, compute=COMPUTE, seed=0):
    """Random parameters, none of them at its neutral value."""
    init = jax.jit(lambda key: nn.meta.unbox(Transformer(config, compute).init(key, jnp.zeros((1, 2, config.d_model)))))
    params = init(jax.random.key(seed))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(x.dtype), params)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(config, params, x, compute=COMPUTE, **kwargs):
    return Transformer(config, compute).apply({"params": params}, x, **kwargs)


def _x(batch=2, length=10, width=16, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, length, width)), jnp.float32)


@pytest.mark.parametrize("config", [QWEN, CODEC, dataclasses.replace(CODEC, norm="rmsnorm")])
def test_parameter_count_is_the_config_arithmetic(config):
    sizes = [x.size for x in jax.tree.leaves(_params(config))]
    assert sum(sizes) == config.num_params()


def test_initial_values():
    variables = jax.jit(lambda key: Transformer(CODEC, COMPUTE).init(key, _x()))(jax.random.key(0))
    params = nn.meta.unbox(variables)["params"]
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert abs(kernel.std() - 0.02) < 0.002 and not jnp.array_equal(kernel[0], kernel[1])
    assert not params["layers"]["mlp"]["up"]["bias"].any()
    assert (params["norm"]["scale"] == 1).all() and not params["norm"]["bias"].any()


def test_initial_numbers_are_normal_and_independent():
    draw = jax.jit(lambda key: initializer(1.0)(key, (400, 500)))
    a, b = (np.asarray(draw(jax.random.key(seed)), np.float64) for seed in (0, 1))
    error = 1 / np.sqrt(a.size)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs((a**power).mean() - moment) < 4 * error * np.sqrt((a ** (2 * power)).mean())
    pairs = ((a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]))
    assert all(abs((x * y).mean()) < 4 * error for x, y in pairs)
    # As for independent numbers, the largest singular value is about sqrt(rows) + sqrt(columns).
    assert abs(np.linalg.norm(a, 2) / (np.sqrt(400) + np.sqrt(500)) - 1) < 0.04


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
def test_cached_decoding_equals_whole_rows(scan, window):
    config = dataclasses.replace(QWEN, window=window)
    compute = dataclasses.replace(COMPUTE, scan_layers=scan)
    params = _params(config)
    params = params if scan else unstack_layers(params, config.num_layers)
    x = _x()
    whole, _ = _apply(config, params, x, compute)
    cache = KVCache.zeros(config, 2, 12, jnp.float32)
    outs = []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 10)):
        y, cache = _apply(config, params, x[:, start:stop], compute, cache=cache)
        outs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=2e-5)
    assert cache.lengths_B.tolist() == [10, 10]


def test_right_padded_prompts_decode_as_if_alone():
    """Requests of 6 and 3 positions in one batch: the padding is overwritten and never attended to."""
    params, x = _params(QWEN), _x(length=8)
    lengths = jnp.array([6, 3])
    prompt = jnp.where((jnp.arange(6) < lengths[:, None])[..., None], x[:, :6], 1e3)
    cache = KVCache.zeros(QWEN, 2, 16, jnp.float32)
    valid = jnp.arange(6) < lengths[:, None]
    _, cache = _apply(QWEN, params, prompt, cache=cache, cache_valid_BL=valid)
    assert cache.lengths_B.tolist() == [6, 3]
    outs = []
    for i in range(2):
        step = jnp.stack([x[0, 6 + i], x[1, 3 + i]])[:, None]
        y, cache = _apply(QWEN, params, step, cache=cache)
        outs.append(y[:, 0])
    first, _ = _apply(QWEN, params, x[:1, :8])
    second, _ = _apply(QWEN, params, x[1:, :5])
    np.testing.assert_allclose(jnp.stack(outs)[:, 0], first[0, 6:8], atol=2e-5)
    np.testing.assert_allclose(jnp.stack(outs)[:, 1], second[0, 3:5], atol=2e-5)


@pytest.mark.parametrize("config", [QWEN, CODEC])
def test_scanned_equals_unrolled(config):
    params = _params(config)
    split = unstack_layers(params, config.num_layers)
    unrolled = Transformer(config, dataclasses.replace(COMPUTE, scan_layers=False))
    expected = jax.eval_shape(lambda: nn.meta.unbox(unrolled.init(jax.random.key(0), _x()))["params"])
    assert jax.tree.map(jnp.shape, split) == jax.tree.map(jnp.shape, expected)
    a, _ = _apply(config, params, _x())
    b, _ = _apply(config, split, _x(), unrolled.compute)
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_no_gradient(scan):
    params = _params(QWEN)
    params = params if scan else unstack_layers(params, QWEN.num_layers)
    segments = jnp.array([[1] * 4 + [2] * 5 + [0], [1] * 10], jnp.int32)

    def gradient(remat):
        model = Transformer(QWEN, dataclasses.replace(COMPUTE, remat=remat, scan_layers=scan))
        f = lambda p: jnp.sin(model.apply({"params": p}, _x(), segment_ids_BL=segments)[0]).sum()  # noqa: E731
        return jax.jit(jax.grad(f))(params)

    expected = gradient("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient(remat), expected)


@pytest.mark.parametrize("scan", [True, False])
def test_offloading_moves_inputs_of_rows_and_changes_no_gradient(scan, monkeypatch):
    params = _params(QWEN)
    params = params if scan else unstack_layers(params, QWEN.num_layers)

    def gradient(remat, length=32):
        model = Transformer(QWEN, dataclasses.replace(COMPUTE, remat=remat, scan_layers=scan))
        f = lambda p: jnp.sin(model.apply({"params": p}, _x(length=length))[0]).sum()  # noqa: E731
        return jax.jit(jax.grad(f)).trace(params)

    assert "<host>" in str(gradient("offload").jaxpr)
    assert "<host>" not in str(gradient("offload", length=11).jaxpr)  # as long as a patch
    moved, kept = (gradient(remat).lower().compile()(params) for remat in ("offload", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), moved, kept)
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(addressable_memories=list)])
    with pytest.raises(ConfigError, match=r"compute.remat: .* no pinned_host memory"):
        gradient("offload")


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_saves_memory(remat):
    config = dataclasses.replace(QWEN, num_layers=6)
    x = jax.ShapeDtypeStruct((8, 256, 16), jnp.float32)

    def temporary(remat):
        model = Transformer(config, dataclasses.replace(COMPUTE, remat=remat))
        params = jax.eval_shape(lambda: _params_abstract(model))
        f = jax.jit(jax.grad(lambda p, x: jnp.square(model.apply({"params": p}, x)[0]).sum()))
        return f.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(remat) < 0.5 * temporary("none")


def _params_abstract(model):
    return nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2, 16))))["params"]


@pytest.mark.parametrize("config", [QWEN, CODEC])
def test_packed_documents_do_not_see_each_other(config):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), _params(config))
        compute = dataclasses.replace(COMPUTE, dtype="float64", param_dtype="float64")
        x = jnp.asarray(_x(batch=1, length=12), jnp.float64)
        segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3], jnp.int32)
        positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], jnp.int32)
        packed, _ = _apply(config, params, x, compute, segment_ids_BL=segments, positions_BL=positions)
        for start, stop in ((0, 5), (5, 9)):
            alone, _ = _apply(config, params, x[:, start:stop], compute)
            np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-11, atol=1e-12)


def test_bfloat16_keeps_norms_and_softmax_wide():
    params = _params(QWEN)
    exact, _ = _apply(QWEN, params, _x())
    rounded, _ = _apply(QWEN, params, _x(), dataclasses.replace(COMPUTE, dtype="bfloat16"))
    assert rounded.dtype == jnp.bfloat16
    assert jnp.linalg.norm(rounded.astype(jnp.float32) - exact) < 0.02 * jnp.linalg.norm(exact)


def test_refuses_a_cache_that_cannot_work():
    params = _params(CODEC)
    cache = KVCache.zeros(CODEC, 2, 12, jnp.float32)
    with pytest.raises(ValueError, match="causal stack"):
        Transformer(CODEC, COMPUTE).apply({"params": params}, _x(), cache=cache)
    cache, ids = KVCache.zeros(QWEN, 2, 12, jnp.float32), jnp.ones((2, 10), jnp.int32)
    params = _params(QWEN)
    with pytest.raises(ValueError, match="without segment ids"):
        Transformer(QWEN, COMPUTE).apply({"params": params}, _x(), cache=cache, segment_ids_BL=ids)
