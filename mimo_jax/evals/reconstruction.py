"""How well an audio tokenizer reproduces held-out clips, and how it uses its codebooks.

N clips, S samples, M RVQ frames, R levels, K entries of a codebook, X draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mimo_jax.audio.features import LOG_FLOOR, MEL_SCALES, hann_window, mel_filterbank, mel_scale_config
from mimo_jax.config import AudioTokenizerConfig, MelConfig
from mimo_jax.evals.codebooks import codebook_use
from mimo_jax.evals.intervals import Interval, mean_interval
from mimo_jax.models.tokenizer.codec import Codec


def mel_distance(reference_S: np.ndarray, decoded_S: np.ndarray, sample_rate: int = 24_000) -> tuple[float, int]:
    """Multi-scale log-mel distance: L1 of natural logs, mean over bins and frames, summed over the three scales.

    What is longer than the reference is ignored, what is missing counts as silence.

    Returns:
        The distance, and the number of frames of the coarsest scale: the weight of the clip in a mean.
    """
    decoded_S = np.pad(decoded_S[: len(reference_S)], (0, max(0, len(reference_S) - len(decoded_S))))
    total, count = 0.0, 0
    for scale in MEL_SCALES:
        config = mel_scale_config(scale, sample_rate)
        reference, decoded = (_log_mel(wav, config) for wav in (reference_S, decoded_S))
        total += float(np.abs(reference - decoded).mean())
        count = len(reference)
    return total, count


def _log_mel(wav_S: np.ndarray, config: MelConfig) -> np.ndarray:
    size = config.n_fft
    wav_S = np.pad(np.asarray(wav_S, np.float64), (0, max(0, size - len(wav_S))))
    frames = np.lib.stride_tricks.sliding_window_view(wav_S, size)[:: config.hop_length]
    window = hann_window(size)
    magnitude = np.abs(np.fft.rfft(frames * (window / np.sqrt(np.sum(window**2))), axis=1))
    return np.log(np.maximum(magnitude @ mel_filterbank(config), LOG_FLOOR))


@dataclass(frozen=True)
class Reconstruction:
    """Clips after the tokenizer."""

    codes: list[np.ndarray]  # of each clip, uint16 [M, R]
    decoded: dict[int, list[np.ndarray]]  # waves of all clips, float32 [S_i], by the number of levels decoded from


@dataclass(frozen=True)
class ReconstructionQuality:
    """Measurements over held-out clips."""

    distance: dict[int, Interval]  # `mel_distance` by number of levels decoded from
    perplexity: tuple[Interval, ...]  # of the codes of each level
    used: tuple[float, ...]  # share of the codebook entries that occur, of each level


def reconstruct(codec: Codec, wavs: Sequence[np.ndarray], levels: Sequence[int] = (8, 20)) -> Reconstruction:
    """Encodes clips [S_i] at the codec's sample rate and decodes them from so many levels (at most those it has).

    Raises:
        ValueError: there is no clip, or one is empty.
    """
    if not wavs:
        raise ValueError("reconstruction: expected at least one clip")
    codes = codec.encode(wavs)
    chosen = sorted({min(n, codec.config.rvq.num_levels) for n in levels})
    pairs = list(zip(codes, wavs, strict=True))
    return Reconstruction(codes, {n: [codec.decode(c[:, :n])[: len(wav)] for c, wav in pairs] for n in chosen})


def reconstruction_quality(
    made: Reconstruction, wavs: Sequence[np.ndarray], config: AudioTokenizerConfig
) -> ReconstructionQuality:
    """Measures what `reconstruct` made of `wavs`."""
    distance = {}
    for n, decoded in made.decoded.items():
        pairs = [mel_distance(wav, wave, config.mel.sample_rate) for wav, wave in zip(wavs, decoded, strict=True)]
        value_N, frames_N = np.asarray(pairs, np.float64).T
        distance[n] = mean_interval(value_N * frames_N, frames_N)
    levels = codebook_use(made.codes, config.rvq.codebook_sizes)
    return ReconstructionQuality(distance, tuple(x.perplexity for x in levels), tuple(x.used for x in levels))
