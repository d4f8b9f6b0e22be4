"""config.json and tensors of the published models: both directions agree, and what cannot be expressed is named."""

import dataclasses
import json

import numpy as np
import pytest
from interop.builders import LM, TOKENIZERS, arrays, assert_same, read, write_model

from mimo_jax import presets
from mimo_jax.config import ConfigError, TransformerConfig
from mimo_jax.interop import published
from mimo_jax.interop.safetensors import SafetensorsError, save
from mimo_jax.models.audio_lm import unroll_params
from mimo_jax.trees import flatten

MODELS = {"audio_lm": LM, **TOKENIZERS}


@pytest.mark.parametrize("size", presets.SIZES)
def test_every_preset_survives_a_config_json(size, tmp_path):
    for config in (presets.audio_lm(size), presets.audio_tokenizer(size)):
        values = published.config_json(config, "bfloat16")
        (tmp_path / "config.json").write_text(json.dumps(values))
        read = published.read_config(tmp_path)
        assert published.config_json(read, "bfloat16") == values
        if published.kind_of(tmp_path) == "audio_lm":
            assert read == config
        else:  # how codebooks are learned is not published
            rvq = dataclasses.replace(config.rvq, ema_decay=0.99)
            assert read == dataclasses.replace(config, rvq=rvq)


@pytest.mark.parametrize("name", MODELS)
def test_arrays_survive_a_published_folder(name, tmp_path):
    config, tree = MODELS[name], arrays(MODELS[name])
    folder = write_model(tmp_path / "model", config, tree)
    load = published.load_lm if config is LM else published.load_tokenizer
    loaded_config, loaded = load(folder)
    assert loaded_config == config
    assert_same(flatten(loaded), flatten(tree["params"] if config is LM else tree))
    assert all(x.dtype == np.float64 for x in flatten(load(folder, np.float64)[1]).values())


def test_linear_maps_are_transposed_and_layers_numbered_as_published(tmp_path):
    tree = arrays(LM)
    out = published.to_published(tree["params"], LM)
    q = tree["params"]["llm"]["transformer"]["layers"]["attn"]["q"]
    x = np.random.default_rng(1).normal(size=16).astype(np.float32)
    expected = np.einsum("d,dnh->nh", x, q["kernel"][2]) + q["bias"][2]
    weight, bias = (out[f"model.layers.2.self_attn.q_proj.{name}"] for name in ("weight", "bias"))
    np.testing.assert_allclose((weight @ x + bias).reshape(4, 6), expected, rtol=1e-5)
    np.testing.assert_array_equal(
        out["speech_embeddings.1.weight"], tree["params"]["patch_encoder"]["embedding"][13 : 13 + 10]
    )
    tokenizer = TOKENIZERS["published"]
    tree = arrays(tokenizer)
    out = published.to_published(tree, tokenizer)
    up = tree["params"]["encoder"]["upper"]["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(out["encoder.layers.1.fc1.weight"], up[0].T)  # layer 0 is below the skip


def test_unrolled_layers_and_gradients_have_the_same_names():
    tree = arrays(LM)["params"]
    assert_same(published.to_published(unroll_params(tree, LM), LM), published.to_published(tree, LM))
    part = {"llm": {"head": tree["llm"]["head"]}}
    assert list(published.to_published(part, LM)) == ["lm_head.weight"]


def test_codebooks_that_never_had_buffers_get_those_of_a_trained_one():
    tokenizer = TOKENIZERS["published"]
    tree = arrays(tokenizer)
    out = published.to_published({name: tree[name] for name in ("params", "codebook")}, tokenizer)
    assert out["encoder.quantizer.vq.layers.2._codebook.inited"] == [1.0]
    window = out["decoder.vocoder.head.istft.window"]
    assert window.shape == (128,) and window[0] == 0 and window[64] == 1


def test_wrong_tensors_are_named_with_both_shapes(tmp_path):
    folder = write_model(tmp_path / "model", LM, arrays(LM))
    good = read(folder)

    def refused(tensors, message):
        save_over(folder, tensors)
        with pytest.raises(SafetensorsError, match=message):
            published.load_lm(folder)

    name = "model.layers.1.mlp.up_proj.weight"
    refused({k: v for k, v in good.items() if k != name}, rf"{name}: missing, expected \[24, 16\]")
    refused(good | {name: good[name].T.copy()}, rf"{name}: found \[16, 24\], expected \[24, 16\]")
    refused(good | {"extra.weight": np.zeros((2, 3))}, r"extra.weight \[2, 3\]: unknown")
    refused(good | {name: good[name].astype(np.float16)}, f"{name}: found float16, expected float32")


def save_over(folder, tensors):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save(folder, tensors)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (LM, {"hidden_size": None}, "hidden_size: expected int, got None"),
        (LM, {"rope_scaling": {"type": "yarn"}}, "rope_scaling: expected None"),
        (LM, {"use_sliding_window": True, "sliding_window": 64}, "sliding_window: expected None"),
        (LM, {"speech_zeroemb_idx": "0-0-0"}, "speech_zeroemb_idx: expected the last id"),
        (LM, {"delay_pattern": "0-1"}, "delay_pattern: expected 3 numbers"),
        (LM, {"speech_vocab_size": "many"}, "speech_vocab_size: expected numbers joined by -"),
        (TOKENIZERS["other"], {"kernel_size": 5}, "kernel_size: expected 3, got 5"),
        (TOKENIZERS["other"], {"ln_type": "BatchNorm"}, "ln_type: expected LayerNorm or RMSNorm"),
        (TOKENIZERS["other"], {"avg_pooler": 3}, "pool: expected 1 or 2"),
        (TOKENIZERS["other"], {"codebook_size": []}, "codebook_size: expected 1 to 3 sizes"),
    ],
)
def test_settings_that_are_wrong_or_not_computed_here_are_refused_by_name(tmp_path, config, settings, message):
    folder = write_model(tmp_path / "model", config, arrays(config), **settings)
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        published.read_config(folder)


@pytest.mark.parametrize("text", ["nonsense", "[1]", "[" * 100_000])
def test_a_config_json_that_is_none_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json: expected a JSON object"):
        published.read_config(tmp_path)


def test_models_that_the_format_cannot_express_are_refused_by_setting():
    narrow = dataclasses.replace(LM, patch_encoder=TransformerConfig.qwen2(8, 2, 2, 4, 16, causal=False))
    with pytest.raises(ConfigError, match=r"model.patch_encoder.d_ff: the published format has 32 where .* has 16"):
        published.lm_config_json(narrow)
    tokenizer = TOKENIZERS["other"]
    window = dataclasses.replace(tokenizer, vocoder=dataclasses.replace(tokenizer.vocoder, rope_theta=5.0))
    with pytest.raises(ConfigError, match=r"model.vocoder.rope_theta"):
        published.tokenizer_config_json(window)


def test_a_vocabulary_without_dashes_is_that_of_every_channel(tmp_path):
    one = dataclasses.replace(LM, codebook_sizes=(8, 8, 8), delays=(0, 0, 0))
    folder = write_model(
        tmp_path / "model", one, arrays(one), speech_vocab_size="9", speech_zeroemb_idx="8", delay_pattern="0"
    )
    assert published.read_lm_config(folder) == one
