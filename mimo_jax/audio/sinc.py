"""Windowed-sinc resampling: what the published models' inputs went through.

Source: published description of torchaudio's `resample` at its defaults (6 zero crossings, roll-off 0.99, Hann window).
"""

from __future__ import annotations

import math

import numpy as np

ZERO_CROSSINGS, ROLL_OFF = 6, 0.99
_CHUNK = 1 << 17  # output samples at a time: bounds the memory, and changes no sample


def resample_sinc(wav: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resamples by a Hann-windowed sinc of 6 zero crossings on each side, cut off at 0.99 of the lower Nyquist rate.

    Output sample j lies at input sample j * source / target; the input is zero beyond its ends. Samples at the lower
    rate are worth 1 / 0.99 of a zero crossing.

    Returns:
        float32 [ceil(S * target_rate / source_rate)].
    """
    wav = np.ascontiguousarray(wav, np.float32)
    common = math.gcd(source_rate, target_rate)
    source, target = source_rate // common, target_rate // common
    if source == target:
        return wav
    cutoff = min(source, target) * ROLL_OFF / source  # zero crossings per input sample
    reach = math.ceil(ZERO_CROSSINGS / cutoff)
    # The weights of an output sample depend on where it lies between two input samples: one of `target` phases.
    phases = np.arange(target) * source % target / target
    crossings = (np.arange(-reach, reach + 2) - phases[:, None]) * cutoff
    crossings = np.clip(crossings, -ZERO_CROSSINGS, ZERO_CROSSINGS)
    weights = cutoff * np.sinc(crossings) * np.cos(crossings * np.pi / (2 * ZERO_CROSSINGS)) ** 2

    length = -(-len(wav) * target // source)
    out = np.empty(length, np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(wav, (reach, reach + 2)), weights.shape[1])
    for first in range(0, length, _CHUNK):
        j = np.arange(first, min(first + _CHUNK, length))
        out[j] = np.einsum("jk,jk->j", windows[j * source // target], weights[j % target])
    return out
