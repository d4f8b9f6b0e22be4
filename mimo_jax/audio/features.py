"""Framing, STFT and log-mel spectrogram in JAX, in the dtype of the wave (float32 or float64).

B rows, S samples, T frames, N samples of a frame (n_fft), F = N / 2 + 1 frequency bins. `...` are any leading axes.

No frame is centred: frame t is the window that starts at sample hop * t. Centring is the padding of a clip's slot in a
packed row (see `mimo_jax.rows.TokenizerRows`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import MelConfig

# Reconstruction is judged at three scales, in training and in evaluation: scale i has 2^i mel bins, window
# 15 * 2^(i-1) and hop 15 * 2^(i-2) (240/480/960 and 120/240/480 samples; report section 2.1).
MEL_SCALES = (5, 6, 7)
# Smallest magnitude that a log-mel distance tells from silence. With normalised windows, noise of one 16-bit step has
# mel magnitudes around 1e-5.
LOG_FLOOR = 1e-5


def mel_scale_config(scale: int, sample_rate: int) -> MelConfig:
    """Mel spectrogram of scale i: 2^i bins, window 15 * 2^(i-1), hop 15 * 2^(i-2) samples."""
    window = 15 * 2 ** (scale - 1)
    return MelConfig(sample_rate, n_fft=window, win_length=window, hop_length=window // 2, n_mels=2**scale)


def hann_window(length: int, size: int | None = None) -> np.ndarray:
    """Periodic Hann window, zero-padded symmetrically to `size`: float64 [size], [length] by default."""
    size = length if size is None else size
    if size < length:
        raise ValueError(f"hann_window: expected a size of at least {length} samples, got {size}")
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(length) / length)
    left = (size - length) // 2
    return np.pad(window, (left, size - length - left))


@functools.lru_cache(maxsize=32)
def mel_filterbank(config: MelConfig) -> np.ndarray:
    """Triangular filters, equally spaced on the HTK mel scale, each with a peak of 1 (no area normalisation).

    Returns:
        float64 [F, n_mels], read-only. A filter narrower than the distance of two bins may be all zero.

    Source: report section 2.1; the scale is mel = 2595 log10(1 + Hz / 700).
    """
    top = config.sample_rate / 2 if config.f_max is None else config.f_max
    bins_F = np.linspace(0.0, config.sample_rate / 2, config.n_fft // 2 + 1)
    low, high = 2595.0 * np.log10(1.0 + np.array([config.f_min, top]) / 700.0)
    corners = 700.0 * (10.0 ** (np.linspace(low, high, config.n_mels + 2) / 2595.0) - 1.0)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins_F[:, None] - left) / (centre - left)
    falling = (right - bins_F[:, None]) / (right - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling))
    filters.setflags(write=False)
    return filters


def frames(wav: jax.Array, size: int, hop: int, count: int | None = None) -> jax.Array:
    """Cuts a wave [..., S] into T = `count` frames (S // hop by default): [..., T, size].

    Frame t is wav[hop * t : hop * t + size], zero beyond the end. The wave is viewed as blocks of `hop` samples, and a
    frame is ceil(size / hop) neighbouring blocks, so that no array of indices is needed.
    """
    samples = wav.shape[-1]
    count = samples // hop if count is None else count
    blocks_per_frame = -(-size // hop)
    needed = (count + blocks_per_frame - 1) * hop
    lead = [(0, 0)] * (wav.ndim - 1)
    wav = jnp.pad(wav, [*lead, (0, max(0, needed - samples))])[..., :needed]
    blocks = wav.reshape(*wav.shape[:-1], -1, hop)
    parts = jnp.stack([blocks[..., i : i + count, :] for i in range(blocks_per_frame)], axis=-2)
    return parts.reshape(*parts.shape[:-2], blocks_per_frame * hop)[..., :size]


def stft(wav: jax.Array, config: MelConfig, *, normalized: bool = False, count: int | None = None) -> jax.Array:
    """Short-time Fourier transform: complex [..., T, F].

    Args:
        wav: [..., S], float32 or float64 (narrower floats are widened to float32).
        normalized: divide by the root of the window's energy.
        count: number of frames T; S // hop by default.
    """
    wav = jnp.asarray(wav)
    wav = wav.astype(jnp.promote_types(wav.dtype, jnp.float32))
    window = hann_window(config.win_length, config.n_fft)
    if normalized:
        window = window / np.sqrt(np.sum(window**2))
    frames_TN = frames(wav, config.n_fft, config.hop_length, count)
    return jnp.fft.rfft(frames_TN * window.astype(wav.dtype), axis=-1)


def istft_frames(spectrum: jax.Array) -> jax.Array:
    """Inverse transform of complex [..., T, F], times the Hann window: real [..., T, N] for the vocoder to overlap-add.

    The imaginary parts of the first and the last bin are ignored.
    """
    size = 2 * (spectrum.shape[-1] - 1)
    frames_TN = jnp.fft.irfft(spectrum, n=size, axis=-1)
    return frames_TN * hann_window(size).astype(frames_TN.dtype)


def frame_mel(wav: jax.Array, config: MelConfig, *, normalized: bool = False, count: int | None = None) -> jax.Array:
    """Mel-weighted STFT magnitudes (power 1): [..., T, n_mels], not negative; arguments as for `stft`."""
    magnitude_TF = jnp.abs(stft(wav, config, normalized=normalized, count=count))
    filters = mel_filterbank(config).astype(magnitude_TF.dtype)
    # Accelerators would otherwise round the inputs to bfloat16.
    return jnp.matmul(magnitude_TF, filters, precision=jax.lax.Precision.HIGHEST)


def frame_log_mel(wav: jax.Array, config: MelConfig) -> jax.Array:
    """Natural log of `frame_mel`, clipped below at `config.floor`: [..., S // hop, n_mels]."""
    return jnp.log(jnp.maximum(frame_mel(wav, config), config.floor))
