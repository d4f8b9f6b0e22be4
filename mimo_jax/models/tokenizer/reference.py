"""Artefacts of the released code's batching, for comparison with it; our own path has none of them.

The released tokenizer pads the clips of a packed batch to the longest one before each convolution, and lets the padding
be seen:

* log-mel padding is 0.0 and not silence; the first convolution turns it into values that the second one reads;
* before pooling, a shorter clip is continued by its last hidden frame, the longest one by zeros;
* the decoder's group norms count the padding as frames of zeros;
* the padded frames of the vocoder's head are not silent, and the inverse STFT adds them into the end of a shorter clip.

All of it depends only on the length of the longest clip, the "extent". So rows still run one by one: the modules take,
beside the segment ids, ids of the extent, and `Codec(reference_quirks=True)` passes them. The last segment of a clip of
more than 60 s is in one batch with the segments before it. With `pool` 1 the released decoder refuses a packed batch;
what is computed here is what it makes of a padded one.

S samples, T mel frames (100 Hz), M RVQ frames (25 Hz), R levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mimo_jax.audio.packing import empty_row, num_mel_frames, slot_codes, write_clip
from mimo_jax.config import AudioTokenizerConfig

# The released code encodes as many sequences together as have this many mel frames in all (about 43 minutes).
PACKED_FRAMES = 256_000


def packed_extents(lengths: Sequence[int]) -> list[int]:
    """Mel frames of the longest sequence in the batch of each sequence, where batches are filled in order."""
    batches: list[list[int]] = []
    for length in lengths:
        if not batches or sum(batches[-1]) + length > PACKED_FRAMES:
            batches.append([])
        batches[-1].append(length)
    return [max(batch) for batch in batches for _ in batch]


def wave_batch(wavs: Sequence[np.ndarray], config: AudioTokenizerConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A padded batch for `AudioTokenizer.encode_features`, one clip of at most one segment in each row.

    Returns:
        wav_BS float32; segment_ids_BT and extent_BT int32.
    """
    row_codes = max(slot_codes(len(wav), config) for wav in wavs)
    rows = [empty_row(row_codes, config) for _ in wavs]
    for (wav_S, ids_T), wav in zip(rows, wavs, strict=True):
        write_clip(wav_S, ids_T, 0, wav, 1, config)
    longest = max(num_mel_frames(len(wav), config) for wav in wavs)
    ids_BT = np.stack([ids_T for _, ids_T in rows])
    return np.stack([wav_S for wav_S, _ in rows]), ids_BT, _extent(ids_BT, longest)


def code_batch(codes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A padded batch for `AudioTokenizer.dequantize` and `decode_features` of sequences [M_i, R].

    Returns:
        codes_BMR, segment_ids_BM and extent_BM, int32.
    """
    length = max(map(len, codes))
    codes_BMR = np.stack([np.pad(np.asarray(c, np.int32), ((0, length - len(c)), (0, 0))) for c in codes])
    ids_BM = np.stack([(np.arange(length) < len(c)).astype(np.int32) for c in codes])
    return codes_BMR, ids_BM, _extent(ids_BM, length)


def _extent(ids_BL: np.ndarray, longest: int) -> np.ndarray:
    return np.broadcast_to((np.arange(ids_BL.shape[1]) < longest).astype(np.int32), ids_BL.shape)
