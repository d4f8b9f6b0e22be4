"""Audio language model: cached = whole, stepwise = teacher-forced."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import lm_cases

from mimo_jax.config import ComputeConfig
from mimo_jax.interop.published import load_lm
from mimo_jax.models.audio_lm import AudioLM, active_channels, init_params, unroll_params, unrolled
from mimo_jax.models.transformer import KVCache

PUBLISHED = Path(__file__).parents[1] / "data" / "parity" / "lm"


@pytest.mark.parametrize("folder", sorted(PUBLISHED.iterdir()), ids=lambda p: p.name)
def test_converted_tree_is_the_tree_of_the_model(folder):
    config, params = load_lm(folder / "model")
    fresh = jax.eval_shape(lambda: init_params(config, ComputeConfig(), jax.random.key(0)))["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    assert sum(x.size for x in jax.tree.leaves(fresh)) == config.num_params()
    assert set(fresh) == {"llm", "patch_encoder", "patch_decoder"}


@functools.partial(jax.jit, static_argnums=0, static_argnames="method", compiler_options=lm_cases.QUICK)
def _apply(model, params, *args, method=None):
    return model.apply({"params": params}, *args, method=method)


def test_patch_steps_equal_teacher_forcing():
    model, params, c = lm_cases.MODEL, lm_cases.params(), lm_cases.CONFIG
    patches = lm_cases.DOCUMENTS[2].patches
    h = jnp.asarray(np.random.default_rng(0).standard_normal((len(patches), c.llm.d_model)), jnp.float32)
    expected = _apply(model, params, h, patches, method="patch_logits")
    cache = KVCache.zeros(c.patch_decoder, len(patches), c.num_steps, jnp.float32)
    x = _apply(model, params, h, method="start_patch")
    for step in range(c.num_steps):
        logits, cache = _apply(model, params, x, cache, method="patch_decoder_step")
        active = np.asarray(active_channels(c, step))
        codes = np.full((len(patches), c.num_channels), 3, np.int32)
        for r in np.flatnonzero(active):
            frame = step - c.delays[r]
            np.testing.assert_allclose(logits[r], expected[r][:, frame], atol=1e-5)
            codes[:, r] = patches[:, frame, r]
        x = _apply(model, params, codes, active, method="embed_codes")


def test_cached_decoding_with_patches_equals_whole_rows():
    """Two requests of 8 and 5 positions are prefilled right-padded, then continue one position at a time."""
    model, params, c = lm_cases.MODEL, lm_cases.params(), lm_cases.CONFIG
    documents, prompts = [lm_cases.DOCUMENTS[2], lm_cases.DOCUMENTS[0]], np.array([8, 5])
    rows = lm_cases.rows([[d] for d in documents], 12, 8)
    whole = _apply(model, params, rows)
    x = _apply(model, params, rows.text_BL, rows.patches_BCGR, rows.patch_positions_BC, method="embed")
    cache = KVCache.zeros(c.llm, 2, 16, jnp.float32)
    valid = jnp.arange(8) < prompts[:, None]
    h, cache = _apply(model, params, x[:, :8], None, None, cache, valid, method="hidden")
    np.testing.assert_allclose(h[0], whole[0, :8], atol=2e-5)
    np.testing.assert_allclose(h[1, :5], whole[1, :5], atol=2e-5)
    for i in range(4):
        at = prompts + i
        h, cache = _apply(model, params, x[np.arange(2), at][:, None], None, None, cache, method="hidden")
        np.testing.assert_allclose(h[:, 0], whole[np.arange(2), at], atol=2e-5)


def test_unrolled_parameters_compute_the_same():
    c, params = lm_cases.CONFIG, lm_cases.params()
    rows = lm_cases.rows([list(lm_cases.DOCUMENTS)], 34, 18)
    split = unroll_params(params, c)
    model = AudioLM(c, unrolled(lm_cases.COMPUTE))
    np.testing.assert_allclose(_apply(model, split, rows), _apply(lm_cases.MODEL, params, rows), atol=1e-5)


def test_empty_ids_contribute_nothing():
    model, params, c = lm_cases.MODEL, lm_cases.params(), lm_cases.CONFIG
    patches = lm_cases.DOCUMENTS[0].patches.copy()
    patches[:, 1, 2] = c.codebook_sizes[2]
    spoiled = jax.tree.map(np.copy, params)
    last = np.cumsum(c.audio_vocab_sizes) - 1
    spoiled["patch_encoder"]["embedding"][last] = 1e3
    spoiled["llm"]["embedding"][c.empty_id] = 1e3
    text = jnp.array([[c.empty_id, 8]])
    for args, method in (((patches,), "embed_patches"), ((text,), "embed_text")):
        a, b = (_apply(model, p, *args, method=method) for p in (params, spoiled))
        np.testing.assert_array_equal(a, b)
    assert not _apply(model, params, text, method="embed_text")[0, 0].any()
    assert not np.array_equal(
        _apply(model, params, patches, method="embed_patches"),
        _apply(model, params, lm_cases.DOCUMENTS[0].patches, method="embed_patches"),
    )


def test_rows_without_patch_slots_run_no_audio_part():
    rows = lm_cases.alone(lm_cases.DOCUMENTS[1])
    assert rows.patches_BCGR.shape[1] == 0
    only_llm = {"llm": lm_cases.params()["llm"]}
    h = _apply(lm_cases.MODEL, only_llm, rows)
    np.testing.assert_allclose(h, _apply(lm_cases.MODEL, lm_cases.params(), rows), atol=1e-6)


def test_bfloat16_logits_are_float32():
    compute = dataclasses.replace(lm_cases.COMPUTE, dtype="bfloat16")
    rows = lm_cases.rows([list(lm_cases.DOCUMENTS)], 34, 18)
    model = AudioLM(lm_cases.CONFIG, compute)
    h = _apply(model, lm_cases.params(), rows)
    assert h.dtype == jnp.bfloat16
    logits = _apply(model, lm_cases.params(), h, method="text_head")
    exact = _apply(lm_cases.MODEL, lm_cases.params(), h.astype(jnp.float32), method="text_head")
    assert logits.dtype == jnp.float32
    assert jnp.abs(logits - exact).max() < 0.02 * jnp.abs(exact).max()
    assert not jnp.array_equal(logits, logits.astype(jnp.bfloat16).astype(jnp.float32))


def test_table_gradients_of_bfloat16_add_up_over_thousands_of_patches():
    """A sum in bfloat16 stops growing after some hundred terms: every patch here hits the same rows of the tables."""
    params = lm_cases.params()
    patches = np.broadcast_to(np.array([[3, 2, 1], [4, 1, 0]], np.int32), (4096, 2, 3))

    def table_gradient(dtype: str):
        model = AudioLM(lm_cases.CONFIG, ComputeConfig(dtype=dtype))

        def total(table):
            tree = {**params, "patch_encoder": {**params["patch_encoder"], "embedding": table}}
            h = model.apply({"params": tree}, patches, method="embed_patches")
            return jnp.sum(h.astype(jnp.float32)) / len(patches)

        return np.asarray(jax.jit(jax.grad(total))(params["patch_encoder"]["embedding"]), np.float64)

    exact, rough = table_gradient("float32"), table_gradient("bfloat16")
    assert np.linalg.norm(rough - exact) < 0.05 * np.linalg.norm(exact)


def test_patches_of_one_frame_have_steps_too():
    config = dataclasses.replace(lm_cases.CONFIG, group_size=1)
    model = AudioLM(config, lm_cases.COMPUTE)
    variables = jax.eval_shape(lambda: init_params(config, lm_cases.COMPUTE, jax.random.key(0)))
    codes, h = jax.ShapeDtypeStruct((2, 3, 1, 3), jnp.int32), jax.ShapeDtypeStruct((2, 3, 16), jnp.float32)
    loss, hits = jax.eval_shape(functools.partial(model.apply, method="patch_cross_entropy"), variables, h, codes)
    assert loss.shape == hits.shape == (2, 3, 3)
