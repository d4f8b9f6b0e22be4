"""Tokenizer quality: the distance orders what the ear orders, and perplexity counts codes."""

from __future__ import annotations

import numpy as np
import pytest

from mimo_jax import presets
from mimo_jax.evals.reconstruction import Reconstruction, mel_distance, reconstruct, reconstruction_quality
from mimo_jax.models.tokenizer.codec import Codec

TINY = presets.audio_tokenizer("tiny")
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


def test_quality_orders_levels_and_counts_entries():
    codes = np.zeros((64, 20), np.uint16)
    codes[:, 0] = np.arange(64)  # 64 entries, equally often
    codes[:32, 1] = 1  # two entries
    noise = GENERATOR.normal(0, 1, 24_000)
    made = Reconstruction([codes, codes], {n: [SPEECH + noise * 0.1 / n] * 2 for n in (2, 8, 20)})
    quality = reconstruction_quality(made, [SPEECH, SPEECH], TINY)
    assert quality.distance[2].value > quality.distance[8].value > quality.distance[20].value > 0
    assert [quality.perplexity[r].value for r in (0, 1, 2)] == pytest.approx([64, 2, 1])
    assert quality.used[:3] == pytest.approx((64 / 1024, 2 / 1024, 1 / 128))


def test_perplexity_lies_inside_its_own_interval():
    # Each clip has codes of its own, so that a draw, which repeats clips, always has a lower perplexity.
    codes = [np.full((10, 20), i, np.uint16) for i in range(30)]
    made = Reconstruction(codes, {8: [SPEECH] * 30})
    perplexity = reconstruction_quality(made, [SPEECH] * 30, TINY).perplexity[0]
    assert perplexity.value == pytest.approx(30)
    assert perplexity.low < 30 < perplexity.high


def test_no_clip_is_an_error():
    with pytest.raises(ValueError, match="at least one clip"):
        reconstruct(Codec(TINY, {}, {}), [])


def test_clips_come_back_at_their_length_from_as_many_levels_as_there_are(monkeypatch):
    codec = Codec(TINY, {}, {})
    lengths = []
    monkeypatch.setattr(codec, "encode", lambda wavs: [np.zeros((-(-len(w) // 960), 20), np.uint16) for w in wavs])
    monkeypatch.setattr(codec, "decode", lambda codes: lengths.append(codes.shape[1]) or np.zeros(len(codes) * 960))
    made = reconstruct(codec, [SPEECH[:9000], SPEECH[:4000]], levels=(2, 20, 99))
    assert {n: [len(w) for w in waves] for n, waves in made.decoded.items()} == {2: [9000, 4000], 20: [9000, 4000]}
    assert lengths == [2, 2, 20, 20]
