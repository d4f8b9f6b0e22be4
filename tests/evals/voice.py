"""Sounds like a voice, from formulas: the same on every machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mimo_jax.audio.files import load_audio

LIBRIVOX = Path(__file__).parents[1] / "data" / "librivox"


def voice(samples: int) -> np.ndarray:
    """24 harmonics of a gliding pitch at 16 kHz; the goldens of the original packages were made with it."""
    time = np.arange(samples) / 16_000
    phase = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 1.5 * time)) / 16_000
    parts = [np.sin(k * phase) / k * (1 + 0.8 * np.sin(2 * np.pi * (0.7 + 0.3 * k) * time + k)) for k in range(1, 25)]
    return 0.02 * sum(parts)


def clip() -> np.ndarray:
    """Two seconds of a recording at 24 kHz."""
    return load_audio(sorted(LIBRIVOX.glob("*.wav"))[0])[:48_000]
