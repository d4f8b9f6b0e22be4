"""How well an audio tokenizer reproduces held-out clips, and how it uses its codebooks.

N clips, S samples, T frames, M RVQ frames, R levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mimo_jax.audio.features import LOG_FLOOR, MEL_SCALES, hann_window, mel_filterbank, mel_scale_config
from mimo_jax.audio.packing import num_codes, pack_clips, slot_codes
from mimo_jax.config import AudioTokenizerConfig, ComputeConfig, MelConfig
from mimo_jax.evals.intervals import Interval, bootstrap, mean_interval
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer


def mel_distance(reference_S: np.ndarray, decoded_S: np.ndarray, sample_rate: int = 24_000) -> tuple[float, int]:
    """Multi-scale log-mel distance: L1 of natural logs, mean over bins and frames, summed over the three scales.

    Args:
        reference_S: float wave.
        decoded_S: float wave; what is longer than the reference is ignored, what is missing counts as silence.
        sample_rate: Hz.

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
    """Clips after the tokenizer.

    Attributes:
        codes: codes of each clip, uint16 [M, R].
        decoded: waves of all clips, float32 [S_i], by the number of levels they were decoded from.
    """

    codes: list[np.ndarray]
    decoded: dict[int, list[np.ndarray]]


@dataclass(frozen=True)
class ReconstructionQuality:
    """Measurements over held-out clips.

    Attributes:
        distance: multi-scale log-mel distance by number of levels decoded from.
        perplexity: of the codes of each level, by level.
        used: share of the codebook entries that occur, by level.
    """

    distance: dict[int, Interval]
    perplexity: tuple[Interval, ...]
    used: tuple[float, ...]


def reconstruct(
    config: AudioTokenizerConfig,
    compute: ComputeConfig,
    variables: Any,
    wavs: Sequence[np.ndarray],
    levels: Sequence[int] = (8, 20),
    row_codes: int = 512,
) -> Reconstruction:
    """Encodes and decodes clips, packed into rows of one length, so that a single program serves all clips and models.

    Args:
        config: the audio tokenizer.
        compute: precision.
        variables: {"params": ..., "codebook": ...} of `AudioTokenizer`.
        wavs: float clips [S_i] at its sample rate, at least one.
        levels: numbers of levels to decode from; those the tokenizer does not have are left out.
        row_codes: RVQ frames of a row; a longer clip makes all rows longer.

    Raises:
        ValueError: there is no clip, or one is empty.
    """
    if not wavs:
        raise ValueError("reconstruction: expected at least one clip")
    chosen = tuple(sorted({min(n, config.rvq.num_levels) for n in levels}))
    program = _program(config, compute, chosen)
    slots = [slot_codes(len(wav), config) for wav in wavs]
    length = max(row_codes, *slots)
    rows: list[list[int]] = [[]]
    used = 0
    for i, slot in enumerate(slots):
        if used + slot > length:
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += slot
    result = Reconstruction([], {n: [] for n in chosen})
    for row in rows:
        wav_BS, segment_ids_BT = pack_clips([wavs[i] for i in row], config, length)
        codes_BMR, waves = program(variables, wav_BS, segment_ids_BT)
        start = 0
        for i in row:
            frames = num_codes(len(wavs[i]), config)
            result.codes.append(np.asarray(codes_BMR[0, start : start + frames]).astype(np.uint16))
            first = start * config.samples_per_code
            for n, wave_BS in zip(chosen, waves, strict=True):
                result.decoded[n].append(np.asarray(wave_BS[0, first : first + len(wavs[i])]))
            start += slots[i]
    return result


@functools.lru_cache(maxsize=8)
def _program(config: AudioTokenizerConfig, compute: ComputeConfig, levels: tuple[int, ...]) -> Callable[..., Any]:
    model = AudioTokenizer(config, compute)

    @jax.jit
    def run(variables: Any, wav_BS: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        codes_BMR = model.apply(variables, wav_BS, segment_ids_BT, method="encode")
        segment_ids_BM = segment_ids_BT[:, :: config.mel_frames_per_code]
        decoded = [model.apply(variables, codes_BMR[..., :n], segment_ids_BM, method="decode") for n in levels]
        return codes_BMR, decoded

    return run


def reconstruction_quality(
    made: Reconstruction, wavs: Sequence[np.ndarray], config: AudioTokenizerConfig
) -> ReconstructionQuality:
    """Measures what `reconstruct` made of `wavs`."""
    distance = {}
    for n, decoded in made.decoded.items():
        pairs = [mel_distance(wav, wave, config.mel.sample_rate) for wav, wave in zip(wavs, decoded, strict=True)]
        value_N, frames_N = np.asarray(pairs, np.float64).T
        distance[n] = mean_interval(value_N * frames_N, frames_N)
    perplexity, used = [], []
    for level, size in enumerate(config.rvq.codebook_sizes):
        counts = [np.bincount(codes_MR[:, level], minlength=size) for codes_MR in made.codes]
        counts_NK = np.stack(counts).astype(np.float64)
        perplexity.append(bootstrap(functools.partial(_perplexity, counts_NK), len(counts)))
        used.append(float((counts_NK.sum(axis=0) > 0).mean()))
    return ReconstructionQuality(distance, tuple(perplexity), tuple(used))


def _perplexity(counts_NK: np.ndarray, weights_XN: np.ndarray) -> np.ndarray:
    counts_XK = weights_XN @ counts_NK
    share = counts_XK / counts_XK.sum(axis=1, keepdims=True)
    return np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=1))
