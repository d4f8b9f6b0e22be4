"""Tokenizer quality: the distance orders what the ear orders, and perplexity counts codes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mimo_jax import presets
from mimo_jax.config import AudioTokenizerConfig, ComputeConfig, MelConfig, RVQConfig, TransformerConfig
from mimo_jax.evals.reconstruction import Reconstruction, mel_distance, reconstruct, reconstruction_quality
from mimo_jax.models.tokenizer.audio_tokenizer import init_variables
from mimo_jax.models.tokenizer.codec import Codec

GENERATOR = np.random.default_rng(0)
SPEECH = np.sin(np.cumsum(0.05 + 0.02 * np.sin(np.arange(24_000) / 2000))) * 0.3 + GENERATOR.normal(0, 0.01, 24_000)


def test_distance_is_zero_only_for_the_same_wave_and_grows_with_noise():
    distances = [mel_distance(SPEECH, SPEECH + GENERATOR.normal(0, n, 24_000))[0] for n in (0.0, 0.001, 0.01, 0.1)]
    assert distances[0] == 0.0
    assert distances == sorted(distances) and distances[1] > 0.01


def test_halving_the_level_costs_log_two_in_each_of_three_scales():
    loud = GENERATOR.normal(0, 0.2, 24_000)
    assert mel_distance(loud, loud / 2)[0] == pytest.approx(3 * np.log(2), abs=0.02)


def test_longer_output_is_cut_and_shorter_output_is_silence():
    same, frames = mel_distance(SPEECH, np.concatenate([SPEECH, np.ones(960)]))
    assert same == 0.0 and frames == (24_000 - 960) // 480 + 1
    assert mel_distance(SPEECH, SPEECH[:12_000])[0] > 1.0


def small_config() -> AudioTokenizerConfig:
    return AudioTokenizerConfig(
        mel=MelConfig(n_mels=16),
        encoder=TransformerConfig.codec(16, 1, 2, 32, causal=False),
        decoder=TransformerConfig.codec(16, 1, 2, 32, causal=True),
        vocoder=TransformerConfig.codec(8, 1, 2, 16, causal=False, window=(4, 2)),
        rvq=RVQConfig((16, 8, 4)),
        encoder_skip_layer=None,
    )


def test_clips_packed_in_rows_come_out_as_from_the_codec_alone():
    config, compute = small_config(), ComputeConfig()
    shapes = jax.eval_shape(lambda key: init_variables(config, compute, key), jax.random.key(0))
    generator = np.random.default_rng(0)
    values = jax.tree.map(
        lambda x: generator.normal(0, 0.3, getattr(x, "value", x).shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: hasattr(x, "names"),
    )
    values["codebook"] = {k: {**v, "count": np.ones_like(v["count"])} for k, v in values["codebook"].items()}
    wavs = [SPEECH[:n] for n in (9000, 4000, 12_345)]
    made = reconstruct(config, compute, values, wavs, levels=(2, 9), row_codes=26)
    codec = Codec(config, values["params"], values["codebook"], compute)
    assert list(made.decoded) == [2, 3]
    for i, codes_MR in enumerate(codec.encode(wavs)):
        assert made.codes[i].shape == codes_MR.shape and (made.codes[i] == codes_MR).mean() > 0.98
        for n in (2, 3):
            expected = codec.decode(made.codes[i][:, :n])[: len(wavs[i])]
            np.testing.assert_allclose(made.decoded[n][i], expected, atol=1e-4 * np.abs(expected).max())


def test_quality_orders_levels_and_counts_entries():
    codes = np.zeros((64, 20), np.uint16)
    codes[:, 0] = np.arange(64)  # 64 entries, equally often
    codes[:32, 1] = 1  # two entries
    noise = GENERATOR.normal(0, 1, 24_000)
    made = Reconstruction([codes, codes], {n: [SPEECH + noise * 0.1 / n] * 2 for n in (2, 8, 20)})
    quality = reconstruction_quality(made, [SPEECH, SPEECH], presets.audio_tokenizer("tiny"))
    assert quality.distance[2].value > quality.distance[8].value > quality.distance[20].value > 0
    assert [quality.perplexity[r].value for r in (0, 1, 2)] == pytest.approx([64, 2, 1])
    assert quality.used[:3] == pytest.approx((64 / 1024, 2 / 1024, 1 / 128))


def test_perplexity_lies_inside_its_own_interval():
    # Each clip has codes of its own, so that a draw, which repeats clips, always has a lower perplexity.
    codes = [np.full((10, 20), i, np.uint16) for i in range(30)]
    made = Reconstruction(codes, {8: [SPEECH] * 30})
    perplexity = reconstruction_quality(made, [SPEECH] * 30, presets.audio_tokenizer("tiny")).perplexity[0]
    assert perplexity.value == pytest.approx(30)
    assert perplexity.low < 30 < perplexity.high


def test_no_clip_is_an_error():
    with pytest.raises(ValueError, match="at least one clip"):
        reconstruct(small_config(), ComputeConfig(), {}, [])
