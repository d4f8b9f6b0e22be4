"""Pictures of sounds, drawn with matplotlib, without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

from mimo_jax.audio.features import hann_window, mel_filterbank
from mimo_jax.config import MelConfig

# Colours that stay apart for readers who see red and green alike (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#666666", "#882255")
INK, GRID = "#1c2430", "#e3e7ee"
_RANGE = 80.0  # dB


def spectrograms(wavs: Mapping[str, np.ndarray], sample_rate: int) -> bytes:
    """Log-mel spectrograms (100 Hz, 128 bands, 80 dB range) of float waves [S_i], one below the other: a PNG.

    Args:
        wavs: by title; an empty title is not set. All share the range of levels of the first.
    """
    from matplotlib.figure import Figure as Canvas

    pictures = {title: _decibels(wav, sample_rate) for title, wav in wavs.items()}
    top = max(float(next(iter(pictures.values())).max()), -60.0)
    kilohertz = [k for k in (0, 0.5, 1, 2, 4, 8, 12) if k <= sample_rate / 2000]
    mel_top = np.log10(1.0 + sample_rate / 2 / 700.0)
    canvas = Canvas(figsize=(4.6, 1.9 * len(pictures)), dpi=130, layout="constrained")
    grid = canvas.subplots(len(pictures), squeeze=False)
    for axes, (title, decibels) in zip(grid[:, 0], pictures.items(), strict=True):
        extent = (0.0, len(wavs[title]) / sample_rate, 0.0, 1.0)
        levels = {"vmin": top - _RANGE, "vmax": top}
        axes.imshow(decibels.T, origin="lower", aspect="auto", cmap="magma", extent=extent, **levels)
        axes.set_yticks(
            [np.log10(1.0 + 1000.0 * k / 700.0) / mel_top for k in kilohertz], [f"{k:g}" for k in kilohertz]
        )
        axes.tick_params(labelsize=8, length=2, colors=INK)
        axes.set_ylabel("kHz", fontsize=8, color=INK)
        if title:
            axes.set_title(title, fontsize=8, color=INK, loc="left")
    grid[-1, 0].set_xlabel("seconds", fontsize=8, color=INK)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def _decibels(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    n_fft, hop = sample_rate // 25, sample_rate // 100
    config = MelConfig(sample_rate=sample_rate, n_fft=n_fft, win_length=n_fft, hop_length=hop)
    padded = np.pad(np.asarray(wav, np.float32), (n_fft // 2, n_fft))
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][: len(wav) // hop + 1]
    magnitude = np.abs(np.fft.rfft(frames * hann_window(n_fft), axis=1)) @ mel_filterbank(config)
    return 20.0 * np.log10(np.maximum(magnitude, 1e-7))
