"""The published resampler: right on tones, the same for any length of input, and the ceiling in length."""

import numpy as np
import pytest

from mimo_jax.audio import sinc
from mimo_jax.audio.files import load_audio, save_wav
from mimo_jax.audio.sinc import resample_sinc


def _tone(hertz, rate, seconds=0.5):
    return np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 44_101, 48_000])
def test_a_tone_stays_the_same_tone(rate):
    hertz = 0.2 * min(rate, 24_000)
    got = resample_sinc(_tone(hertz, rate), rate, 24_000)
    assert got.dtype == np.float32
    middle = slice(1_000, -1_000)
    np.testing.assert_allclose(got[middle], _tone(hertz, 24_000)[middle], atol=0.005)


def test_frequencies_above_the_new_band_are_removed():
    assert np.abs(resample_sinc(_tone(16_000, 48_000), 48_000, 24_000)[1_000:-1_000]).max() < 0.01


@pytest.mark.parametrize(("samples", "rate"), [(1, 16_000), (3, 48_000), (9_001, 44_100), (0, 16_000)])
def test_length_is_the_ceiling(samples, rate):
    assert len(resample_sinc(np.ones(samples, np.float32), rate, 24_000)) == -(-samples * 24_000 // rate)


def test_the_work_is_cut_into_chunks_without_a_trace(monkeypatch):
    wav = np.random.default_rng(0).standard_normal(4_000).astype(np.float32)
    whole = resample_sinc(wav, 22_050, 24_000)
    monkeypatch.setattr(sinc, "_CHUNK", 37)
    np.testing.assert_array_equal(resample_sinc(wav, 22_050, 24_000), whole)


def test_files_are_read_with_the_resampler_that_is_asked_for(tmp_path):
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, 4_000).astype(np.float32)
    save_wav(tmp_path / "a.wav", wav, 16_000)
    sinc_wav = load_audio(tmp_path / "a.wav", 24_000, resampler="sinc")
    stored = load_audio(tmp_path / "a.wav", 16_000)
    np.testing.assert_array_equal(sinc_wav, resample_sinc(stored, 16_000, 24_000))
    assert np.abs(sinc_wav - load_audio(tmp_path / "a.wav")).max() > 0.01
