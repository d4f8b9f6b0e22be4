"""Audio language model: equal to the reference implementation, cached = whole, stepwise = teacher-forced."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import lm_cases, lm_parity

from mimo_jax.config import ComputeConfig
from mimo_jax.models.audio_lm import AudioLM, active_channels, init_params, unroll_params, unrolled
from mimo_jax.models.transformer import KVCache, Transformer

NAMES = ("text_only", "text_audio_text", "streaming", "streaming_long_text", "two_audio_nosep")


class Case:
    """One reference model with its goldens; `close` compares against the manifest's tolerance."""

    def __init__(self, parity_dir: Path, case: str) -> None:
        folder = parity_dir / "lm" / case
        self.config, self.params = lm_parity.load_model(folder / "model")
        self.expected = np.load(folder / "expected.npz")
        self.tolerances = json.loads((parity_dir / "manifest.json").read_text())[f"lm/{case}/expected.npz"]
        self.model = AudioLM(self.config, ComputeConfig())

    def run(self, *args, method=None):
        return _apply(self.model, self.params, *args, method=method)

    def close(self, name: str, actual) -> None:
        expected = self.expected[name]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=self.tolerances[name]["suggested_atol"], err_msg=name)

    def close_part(self, name: str, actual, part) -> None:
        atol = self.tolerances[name]["suggested_atol"]
        np.testing.assert_allclose(actual, self.expected[name][part], rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module", params=["lm_a", "lm_b"])
def case(request, parity_dir):
    return Case(parity_dir, request.param)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference_on_whole_inputs(case, name):
    rows = lm_parity.rows_from_ids(case.expected[f"{name}/input_ids"], case.config)
    x = case.run(rows.text_BL, rows.patches_BCGR, rows.patch_positions_BC, method="embed")
    case.close(f"{name}/input_embeds", x[0])
    if rows.patches_BCGR.shape[1]:
        patches = case.run(rows.patches_BCGR[0], method="embed_patches")
        at = rows.patch_positions_BC[0]
        case.close_part(f"{name}/patch_embeds", patches, at)
    body = Transformer(case.config.llm, ComputeConfig(), final_norm=False)
    stack = {k: v for k, v in case.params["llm"]["transformer"].items() if k != "norm"}
    layers = case.config.llm.num_layers
    case.close(f"{name}/llm_layer_{layers:02d}", body.apply({"params": stack}, x)[0][0])
    h = case.run(rows)
    case.close(f"{name}/llm_final_norm", h[0])
    case.close(f"{name}/text_logits", case.run(h, method="text_head")[0])
    case.close(f"{name}/local_hidden", case.run(h[0], method="start_patch"))
    if f"{name}/tf_codes" in case.expected:
        codes = case.expected[f"{name}/tf_codes"].astype(np.int32)
        logits = case.run(h[0][case.expected[f"{name}/tf_patch_positions"] - 1], codes, method="patch_logits")
        for r, delay in enumerate(case.config.delays):
            steps = np.s_[:, delay : delay + case.config.group_size]
            case.close_part(f"{name}/tf_logits_ch{r}", logits[r], steps)


def _decode_greedily(model, params, h_ND):
    """Codes [N, G, R] of the best guesses, step by step."""
    c = model.config
    codes = np.zeros((len(h_ND), c.group_size, c.num_channels), np.int32)
    cache = KVCache.zeros(c.patch_decoder, len(h_ND), c.num_steps, jnp.float32)
    x = _apply(model, params, h_ND, method="start_patch")
    for step in range(c.num_steps):
        logits, cache = _apply(model, params, x, cache, method="patch_decoder_step")
        active = np.asarray(active_channels(c, step))
        chosen = np.stack([np.asarray(z[:, :-1]).argmax(-1) for z in logits], -1).astype(np.int32)
        for r in np.flatnonzero(active):
            codes[:, step - c.delays[r], r] = chosen[:, r]
        x = _apply(model, params, chosen, active, method="embed_codes")
    return codes


def test_greedy_patches_equal_the_reference(case):
    for name in NAMES:
        rows = lm_parity.rows_from_ids(case.expected[f"{name}/input_ids"], case.config)
        if f"{name}/greedy_local_tokens" in case.expected:
            h = case.run(rows)[0][case.expected[f"{name}/greedy_local_positions"]]
            codes = _decode_greedily(case.model, case.params, h)
            np.testing.assert_array_equal(codes, case.expected[f"{name}/greedy_local_tokens"], err_msg=name)


def test_converted_tree_is_the_tree_of_the_model(case):
    fresh = jax.eval_shape(lambda: init_params(case.config, ComputeConfig(), jax.random.key(0)))["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, case.params)
    assert sum(x.size for x in jax.tree.leaves(fresh)) == case.config.num_params()
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
    h = lm_cases.MODEL.apply({"params": only_llm}, rows)
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
