"""Baselines: Opus in place and at its bitrate, Griffin-Lim with the mel spectrogram that it was given."""

from __future__ import annotations

import numpy as np
import pytest
from evals.voice import clip

from mimo_jax.config import ConfigError, MelConfig
from mimo_jax.evals.baselines import OPUS_BITRATES, check_baselines, griffin_lim, opus
from mimo_jax.evals.quality import Source, si_sdr
from mimo_jax.evals.reconstruction import mel_distance

SPEECH = clip()


def test_opus_is_aligned_and_has_the_bitrate_that_is_said():
    pytest.importorskip("av")
    ratios = []
    for bitrate in (*OPUS_BITRATES, 64_000):
        decoded, bits = opus(SPEECH, 24_000, bitrate)
        assert decoded.shape == SPEECH.shape and decoded.dtype == np.float32
        assert bits / (len(SPEECH) / 24_000) == pytest.approx(bitrate, rel=0.35)
        ratios.append(si_sdr(SPEECH, decoded))
    assert ratios == sorted(ratios) and ratios[-1] > 12  # half a sample off, and it would not be
    assert np.array_equal(opus(SPEECH, 24_000, 12_000)[0], opus(SPEECH, 24_000, 12_000)[0])


def test_opus_takes_other_rates_and_very_short_clips():
    pytest.importorskip("av")
    wav = SPEECH[:22_050]
    assert opus(wav, 22_050, 24_000)[0].shape == wav.shape
    assert opus(wav[:7], 24_000, 6_000)[0].shape == (7,)


def test_griffin_lim_keeps_the_mel_spectrogram_and_is_the_same_each_time():
    made = griffin_lim(SPEECH, MelConfig())
    assert made.shape == SPEECH.shape and made.dtype == np.float32
    noise = np.random.default_rng(0).normal(0, 0.05, len(SPEECH))
    assert mel_distance(SPEECH, made)[0] < 1.0 < mel_distance(SPEECH, noise)[0]
    assert Source(SPEECH, 24_000, ("stft",)).measure(made)[0]["stft"] < 1.0
    assert np.array_equal(made, griffin_lim(SPEECH, MelConfig()))
    assert not griffin_lim(np.zeros(3_000), MelConfig()).any()


def test_unknown_baselines_are_refused():
    check_baselines(())
    with pytest.raises(ConfigError, match=r"expected some of opus, griffin-lim, or none, got 'mp3'"):
        check_baselines(("mp3",))
