"""Power mel spectrograms as librosa computes them by default, for networks that were trained on those.

The audio tokenizer's own mel spectrograms are others (HTK scale, magnitudes): `mimo_jax.audio.features`.

S samples, T frames, N samples of a frame, F = N // 2 + 1 bins.
"""

from __future__ import annotations

import functools

import numpy as np

from mimo_jax.audio.features import hann_window


def power_mel(wav_S: np.ndarray, sample_rate: int, n_fft: int, hop: int, n_mels: int) -> np.ndarray:
    """Mel-weighted power of centred frames, zeros beyond the ends: float64 [S // hop + 1, n_mels].

    Source: `librosa.feature.melspectrogram` (0.9 and later) with `htk=False, norm="slaney", power=2.0`. For odd
    `n_fft` there is half a sample less on either side, as there, and the last frame may be missing.
    """
    padded = np.pad(np.asarray(wav_S, np.float64), n_fft // 2)
    frames_TN = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    power_TF = np.abs(np.fft.rfft(frames_TN * hann_window(n_fft), axis=1)) ** 2
    return power_TF @ _filters(sample_rate, n_fft, n_mels)


@functools.lru_cache(maxsize=8)
def _filters(sample_rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """Triangles of equal area, equally spaced on Slaney's mel scale from 0 Hz to Nyquist: float64 [F, n_mels]."""
    # librosa's `fft_frequencies`: multiples of rate / n_fft, so that odd sizes do not reach Nyquist.
    bins_F = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    corners = _hertz(np.linspace(0.0, _mel(sample_rate / 2), n_mels + 2))
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins_F[:, None] - left) / (centre - left)
    falling = (right - bins_F[:, None]) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (right - left))


# Slaney's scale (Auditory Toolbox, 1998): linear up to 1000 Hz, 3 mel in 200 Hz, then 27 mel for a factor of 6.4.
_LINEAR, _KNEE, _FACTOR = 3.0 / 200.0, 1000.0, np.log(6.4) / 27.0


def _mel(hertz: float) -> float:
    return hertz * _LINEAR if hertz < _KNEE else _KNEE * _LINEAR + np.log(hertz / _KNEE) / _FACTOR


def _hertz(mel: np.ndarray) -> np.ndarray:
    knee = _KNEE * _LINEAR
    return np.where(mel < knee, mel / _LINEAR, _KNEE * np.exp(_FACTOR * (np.maximum(mel, knee) - knee)))
