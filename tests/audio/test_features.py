"""Framing, STFT and log-mel features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.audio import features
from mimo_jax.config import MelConfig

SMALL = MelConfig(n_fft=64, win_length=48, hop_length=20, n_mels=8)
CASES = {
    "tok_a": MelConfig(),
    "tok_b": MelConfig(n_fft=1024, win_length=800, n_mels=80, f_min=50.0, f_max=8000.0),
}


def _noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _framed(wav, size, hop, count):
    padded = np.concatenate([wav, np.zeros((*wav.shape[:-1], size + hop * count), wav.dtype)], axis=-1)
    return np.stack([padded[..., hop * t : hop * t + size] for t in range(count)], axis=-2)


def _centred_log_mel(wav, config):
    """Log-mel spectrogram of a clip on its own: both ends reflected, as in the slot of a packed row."""
    padded = np.pad(wav, config.n_fft // 2, mode="reflect")
    mel = features.frame_mel(padded, config, count=len(wav) // config.hop_length + 1)
    return np.log(np.maximum(mel, config.floor))


@pytest.mark.parametrize(("size", "hop"), [(64, 16), (64, 20), (16, 16), (10, 16)])
@pytest.mark.parametrize("samples", [0, 5, 160, 171])
def test_frames_are_the_windows_that_start_at_multiples_of_the_hop(size, hop, samples):
    wav = _noise(2, samples)
    count = samples // hop
    expected = _framed(wav, size, hop, count) if count else np.zeros((2, 0, size))
    np.testing.assert_array_equal(features.frames(wav, size, hop), expected)


def test_frame_count_may_reach_beyond_the_end():
    wav = _noise(1, 50)
    np.testing.assert_array_equal(features.frames(wav, 32, 16, count=5), _framed(wav, 32, 16, 5))


def test_padded_slot_gives_the_same_mel_as_the_clip_alone():
    """The row convention: a clip reflect-padded in its slot, read with un-centred frames, is the centred clip."""
    clip = _noise(470)
    count = len(clip) // SMALL.hop_length + 1
    slot = np.pad(clip, SMALL.n_fft // 2, mode="reflect")
    row = np.concatenate([np.zeros(100, np.float32), slot, _noise(200)])[None]
    mel = features.frame_log_mel(row, SMALL)[0, 5 : 5 + count]
    np.testing.assert_allclose(mel, _centred_log_mel(clip, SMALL), atol=1e-5)


def test_silence_is_the_floor_and_its_gradient_is_finite():
    silence = jnp.zeros((1, 200))
    np.testing.assert_allclose(features.frame_log_mel(silence, SMALL), np.log(1e-7), rtol=1e-6)
    gradient = jax.grad(lambda wav: features.frame_mel(wav, SMALL).sum())(silence)
    assert bool(jnp.isfinite(gradient).all())


def test_gradient_agrees_with_finite_differences():
    with jax.enable_x64(True):
        wav = jnp.asarray(_noise(1, 120), jnp.float64)
        direction = jnp.asarray(np.random.default_rng(1).normal(size=wav.shape))

        def loss(x):
            return features.frame_log_mel(x, SMALL).sum()

        slope = jnp.vdot(jax.grad(loss)(wav), direction)
        measured = (loss(wav + 1e-6 * direction) - loss(wav - 1e-6 * direction)) / 2e-6
        assert features.frame_log_mel(wav, SMALL).dtype == jnp.float64
        np.testing.assert_allclose(slope, measured, rtol=1e-6)


def test_float32_features_are_float64_features_up_to_rounding():
    wav = _noise(2, 4800)
    single = features.frame_log_mel(wav, MelConfig())
    with jax.enable_x64(True):
        double = features.frame_log_mel(wav.astype(np.float64), MelConfig())
        assert single.dtype == jnp.float32 and double.dtype == jnp.float64
        np.testing.assert_allclose(single, double, atol=1e-3)


def test_normalised_stft_of_white_noise_has_unit_power():
    """Dividing by the root of the window's energy keeps the variance, whatever the window length."""
    noise = _noise(1, 48_000)
    for size in (240, 960):
        config = MelConfig(n_fft=size, win_length=size, hop_length=size // 2, n_mels=8)
        power = jnp.mean(jnp.abs(features.stft(noise, config, normalized=True)) ** 2)
        np.testing.assert_allclose(power, 1.0, rtol=0.05)
        ratio = features.frame_mel(noise, config) / features.frame_mel(noise, config, normalized=True)
        np.testing.assert_allclose(ratio, np.sqrt(0.375 * size), rtol=1e-4)


def test_overlap_added_inverse_stft_restores_the_wave():
    config = MelConfig(n_fft=64, win_length=64, hop_length=16, n_mels=8)
    wav = _noise(1, 480)
    spectrum = features.stft(wav, config)
    parts = np.asarray(features.istft_frames(spectrum))[0]
    window = features.hann_window(64)
    out, norm = np.zeros(480 + 64), np.zeros(480 + 64)
    for t, part in enumerate(parts):
        out[16 * t : 16 * t + 64] += part
        norm[16 * t : 16 * t + 64] += window**2
    np.testing.assert_allclose(out[48:480] / norm[48:480], wav[0, 48:480], atol=1e-5)


def test_window_is_periodic_and_padded_symmetrically():
    np.testing.assert_allclose(features.hann_window(4), [0, 0.5, 1, 0.5], atol=1e-12)
    np.testing.assert_allclose(features.hann_window(4, 9), [0, 0, 0, 0.5, 1, 0.5, 0, 0, 0], atol=1e-12)
    with pytest.raises(ValueError, match="at least 8"):
        features.hann_window(8, 4)


def test_a_pure_tone_peaks_in_the_filter_of_its_frequency():
    config = MelConfig()
    centres = 700.0 * (10.0 ** (np.linspace(0, 2595 * np.log10(1 + 12_000 / 700), 130)[1:-1] / 2595) - 1.0)
    for hertz in (500.0, 2000.0, 9000.0):
        tone = np.sin(2 * np.pi * hertz * np.arange(4800) / 24_000).astype(np.float32)
        loudest = int(jnp.argmax(features.frame_mel(tone, config)[5]))
        assert abs(loudest - int(np.argmin(np.abs(centres - hertz)))) <= 1
