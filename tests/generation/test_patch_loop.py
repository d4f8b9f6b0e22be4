"""The patch decoder's loop: what it writes is what the model says, whatever the layout of its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import lm_cases

from mimo_jax.config import ComputeConfig, TransformerConfig
from mimo_jax.generation.patch_loop import decode_patches, for_one_request, patch_loop_params
from mimo_jax.generation.sampling import GREEDY, SamplingConfig, sampling_params
from mimo_jax.models.audio_lm import AudioLM, init_params, unroll_params

GROUPED = TransformerConfig.qwen2(12, 2, 4, 6, 16, num_kv_heads=2)
CODEC = TransformerConfig.codec(8, 2, 2, 16, causal=True, window=(2, 0))
DECODERS = {"qwen2": lm_cases.CONFIG.patch_decoder, "grouped": GROUPED, "codec": CODEC}


def _model(decoder, **compute):
    config = dataclasses.replace(lm_cases.CONFIG, patch_decoder=DECODERS[decoder])
    compute = dataclasses.replace(ComputeConfig(), **compute)
    start = jax.jit(init_params, static_argnums=(0, 1))(config, ComputeConfig(), jax.random.key(0))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.standard_normal(x.shape), x.dtype), start)
    return config, compute, params


def _loop(params, config, one=False):
    loop = patch_loop_params(params, config)
    return {"patch_loop": for_one_request(loop) if one else loop, "patch_encoder": params["patch_encoder"]}


def _decode(config, compute, params, h_BD, sampling, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(h_BD))
    program = jax.jit(decode_patches, static_argnums=(0, 1))
    return np.asarray(program(config, compute, params, h_BD, keys, sampling_params([sampling] * len(h_BD))))


@pytest.mark.parametrize("one", [False, True], ids=["several", "one"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_greedy_codes_are_the_best_of_the_teacher_forced_logits(decoder, one):
    config, compute, params = _model(decoder)
    h_BD = jax.random.normal(jax.random.key(1), (1 if one else 5, config.llm.d_model))
    codes_BGR = _decode(config, compute, _loop(params, config, one), h_BD, GREEDY)
    logits_R = AudioLM(config, compute).apply({"params": params}, h_BD, codes_BGR, method="patch_logits")
    for r, logits in enumerate(logits_R):
        open_BGV = np.asarray(logits)[..., :-1]  # without "empty"
        chosen = np.take_along_axis(open_BGV, codes_BGR[..., r, None], -1)[..., 0]
        np.testing.assert_allclose(chosen, open_BGV.max(-1), atol=1e-4)
    assert len(np.unique(codes_BGR)) > 1


def test_layouts_of_the_weights_change_nothing():
    config, compute, params = _model("grouped")
    h_BD = jax.random.normal(jax.random.key(1), (1, config.llm.d_model))
    warm = SamplingConfig(1.0, top_k=8, top_p=0.9)
    split = unroll_params(params, config)
    trees = [_loop(params, config), _loop(split, config), _loop(params, config, one=True)]
    first = _decode(config, compute, trees[0], h_BD, warm)
    for tree in trees[1:]:
        for seed in range(5):
            again = _decode(config, compute, tree, h_BD, warm, seed)
            np.testing.assert_array_equal(again, _decode(config, compute, trees[0], h_BD, warm, seed))
    assert not np.array_equal(first, _decode(config, compute, trees[0], h_BD, warm, 1))


def test_kernels_write_the_same_patches():
    config, compute, params = _model("qwen2")
    h_BD = jax.random.normal(jax.random.key(1), (3, config.llm.d_model))
    warm = SamplingConfig(0.9, top_p=0.95)
    plain = _decode(config, compute, _loop(params, config), h_BD, warm)
    kernels = dataclasses.replace(compute, kernels="interpret")
    np.testing.assert_array_equal(plain, _decode(config, kernels, _loop(params, config), h_BD, warm))


def test_bfloat16_is_near_float32():
    config, compute, params = _model("qwen2", dtype="bfloat16", param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    h_BD = jax.random.normal(jax.random.key(1), (64, config.llm.d_model))
    low = _decode(config, compute, _loop(params, config), h_BD, GREEDY)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    high = _decode(config, ComputeConfig(), _loop(wide, config), h_BD, GREEDY)
    assert (low[:, 0, 0] == high[:, 0, 0]).mean() > 0.9  # channel 0 comes first: later codes follow from earlier ones
