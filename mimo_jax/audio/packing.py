"""Clips in rows of the audio tokenizer: the layout that `mimo_jax.rows.TokenizerRows` describes.

S samples, T mel frames (100 Hz), M RVQ frames (25 Hz). Everything here is NumPy, on the host.
"""

from __future__ import annotations

import numpy as np

from mimo_jax.config import AudioTokenizerConfig


def num_mel_frames(num_samples: int, config: AudioTokenizerConfig) -> int:
    """Mel frames T_i of a clip: one every hop, centred, the first at sample 0."""
    return num_samples // config.mel.hop_length + 1


def num_codes(num_samples: int, config: AudioTokenizerConfig) -> int:
    """RVQ frames M_i of a clip."""
    return -(-num_mel_frames(num_samples, config) // config.mel_frames_per_code)


def guard_codes(config: AudioTokenizerConfig) -> int:
    """RVQ frames at the end of a slot that keep the windows of its clip out of the next slot (1 as published)."""
    return -(-config.mel.n_fft // config.samples_per_code)


def slot_codes(num_samples: int, config: AudioTokenizerConfig) -> int:
    """RVQ frames that a clip takes up in a row: M_i and the guard."""
    return num_codes(num_samples, config) + guard_codes(config)


def reflect_pad(wav: np.ndarray, config: AudioTokenizerConfig) -> np.ndarray:
    """Reflects n_fft / 2 samples at both ends of a clip [S]: un-centred frames of the result are centred ones of it."""
    if wav.ndim != 1 or len(wav) == 0:
        raise ValueError(f"wav: expected a mono clip of at least one sample, got an array of shape {wav.shape}")
    return np.pad(wav, config.mel.n_fft // 2, mode="reflect")


def write_frames(
    row_wav_S: np.ndarray,
    row_segment_ids_T: np.ndarray,
    start_code: int,
    padded: np.ndarray,
    first_frame: int,
    num_frames: int,
    segment: int,
    config: AudioTokenizerConfig,
) -> int:
    """Writes `num_frames` mel frames of a padded clip, from `first_frame` on, into a slot that begins at `start_code`.

    A part of a long clip sees the samples around it, so its mel frames are exactly those of the whole clip.

    Args:
        row_wav_S: float row, written in place.
        row_segment_ids_T: int32 row at 100 Hz, written in place.
        start_code: first RVQ frame of the slot.
        first_frame, num_frames: mel frames of the clip.
        segment: id of the segment, 1 or more.

    Returns:
        Length of the slot in RVQ frames; the next slot may begin at `start_code` plus it.

    Raises:
        ValueError: the slot does not fit in the row, or the id is 0 (padding).
    """
    if segment < 1:
        raise ValueError(f"segment: expected an id of 1 or more (0 is padding), got {segment}")
    hop, per_code = config.mel.hop_length, config.mel_frames_per_code
    slot = -(-num_frames // per_code) + guard_codes(config)
    if start_code < 0 or (start_code + slot) * per_code > len(row_segment_ids_T):
        row = f"a row of {len(row_segment_ids_T) // per_code}"
        raise ValueError(f"start_code: a slot of {slot} RVQ frames at {start_code} does not fit in {row}")
    samples = padded[first_frame * hop : (first_frame + num_frames - 1) * hop + config.mel.n_fft]
    start_frame = start_code * per_code
    row_wav_S[start_frame * hop : start_frame * hop + len(samples)] = samples
    row_segment_ids_T[start_frame : start_frame + num_frames] = segment
    return slot


def write_clip(
    row_wav_S: np.ndarray,
    row_segment_ids_T: np.ndarray,
    start_code: int,
    wav: np.ndarray,
    segment: int,
    config: AudioTokenizerConfig,
) -> int:
    """Writes one whole clip [S_i] into a slot; see `write_frames`."""
    frames = num_mel_frames(len(wav), config)
    return write_frames(row_wav_S, row_segment_ids_T, start_code, reflect_pad(wav, config), 0, frames, segment, config)


def empty_row(codes: int, config: AudioTokenizerConfig) -> tuple[np.ndarray, np.ndarray]:
    """A row of `codes` RVQ frames that holds nothing: float32 [S] zeros and int32 [T] zeros."""
    wav_S = np.zeros(codes * config.samples_per_code, np.float32)
    return wav_S, np.zeros(codes * config.mel_frames_per_code, np.int32)


def pack_clips(wavs: list[np.ndarray], config: AudioTokenizerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Packs clips [S_i] into one row of as many RVQ frames as they need.

    Returns:
        wav_BS float32 [1, S] and segment_ids_BT int32 [1, T], in which the clips are segments 1, 2, ... in order.
    """
    wav_S, segment_ids_T = empty_row(sum(slot_codes(len(wav), config) for wav in wavs), config)
    start = 0
    for i, wav in enumerate(wavs):
        start += write_clip(wav_S, segment_ids_T, start, wav, i + 1, config)
    return wav_S[None], segment_ids_T[None]
