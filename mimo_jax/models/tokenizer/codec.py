"""The audio tokenizer as a codec: NumPy waves in, NumPy codes out, and back.

S samples (24 kHz), M RVQ frames (25 Hz), R levels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.audio.packing import empty_row, guard_codes, num_codes, num_mel_frames, reflect_pad, write_frames
from mimo_jax.config import AudioTokenizerConfig, ComputeConfig
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer

# Clip lengths that programs are compiled for, when first needed; the longest is a segment.
BUCKET_SECONDS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0)

FLOAT32 = ComputeConfig()


class Codec:
    """Encodes and decodes clips of any length with a few compiled programs.

    A clip is cut into independent segments (60 s, as published), each of which is padded to the next bucket and run in
    a row of its own. So on one machine its codes are a function of the clip alone, bit for bit: not of the clips beside
    it, nor of the order of calls.
    """

    def __init__(
        self,
        config: AudioTokenizerConfig,
        params: Mapping[str, Any],
        codebook: Mapping[str, Any],
        compute: ComputeConfig = FLOAT32,
        segment_seconds: float = 60.0,
    ) -> None:
        """Takes a trained tokenizer.

        Args:
            config: the audio tokenizer.
            params: its parameters, unboxed.
            codebook: its codebook collection.
            compute: precision; `scan_layers` must be that of `params`.
            segment_seconds: length of a segment, rounded to whole RVQ frames. Codes of longer clips depend on it.

        Raises:
            ValueError: a segment would have no RVQ frame.
        """
        self.config = config
        self.segment_codes = round(segment_seconds * config.frame_rate)
        if self.segment_codes < 1:
            raise ValueError(f"segment_seconds: expected at least one RVQ frame, got {segment_seconds}")
        # A clip of exactly 10 s has one RVQ frame more than 250, since its mel frames stand at both ends.
        buckets = {round(seconds * config.frame_rate) + 1 for seconds in BUCKET_SECONDS}
        self._buckets = [*sorted(b for b in buckets if 0 < b < self.segment_codes), self.segment_codes]
        self._variables = jax.device_put({"params": params, "codebook": codebook})
        model = AudioTokenizer(config, compute)

        def encode(variables: Any, wav_BS: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
            return model.apply(variables, wav_BS, segment_ids_BT, method="encode")

        def dequantize(variables: Any, codes_BMR: jax.Array) -> jax.Array:
            return model.apply(variables, codes_BMR.astype(jnp.int32), method="dequantize")

        def decode(variables: Any, q_BMD: jax.Array, segment_ids_BM: jax.Array) -> jax.Array:
            return model.apply(variables, q_BMD, segment_ids_BM, method="decode_features")

        # Two programs for decoding, so that another number of levels costs only a new small one.
        self._encode, self._dequantize, self._decode = jax.jit(encode), jax.jit(dequantize), jax.jit(decode)

    @functools.cached_property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of a SHA-256 over all that codes depend on: settings, encoder and codebooks.

        Training decoder and vocoder further (stage 2) does not change it: shards made before stay valid.
        """
        c, variables = self.config, self._variables
        settings = [dataclasses.asdict(c.mel), dataclasses.asdict(c.encoder), c.rvq.codebook_sizes, c.rvq.epsilon]
        settings += [c.encoder_skip_layer, c.stem_stride, c.pool, self.segment_codes]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        arrays = {"encoder": variables["params"]["encoder"], "codebook": variables["codebook"]}
        for path, x in jax.tree_util.tree_leaves_with_path(arrays):
            digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
            digest.update(np.ascontiguousarray(x).tobytes())
        return digest.hexdigest()[:16]

    def encode(self, wavs: Iterable[np.ndarray], num_levels: int | None = None) -> list[np.ndarray]:
        """Encodes clips.

        A segment's mel frames are those of the whole clip, so all segments but the last give `segment_codes` frames.

        Args:
            wavs: mono clips [S_i] at the tokenizer's sample rate, float.
            num_levels: levels to return (all by default).

        Returns:
            Codes of each clip, uint16 [M_i, R], M_i = ceil((S_i // 240 + 1) / 4).

        Raises:
            ValueError: a clip is empty, not mono or not finite.
        """
        return [self._encode_clip(np.asarray(wav, np.float32), num_levels) for wav in wavs]

    def _encode_clip(self, wav: np.ndarray, num_levels: int | None) -> np.ndarray:
        c = self.config
        padded = reflect_pad(wav, c)
        if not np.isfinite(padded).all():
            raise ValueError("wav: expected finite samples, got NaN or infinity")
        frames, step = num_mel_frames(len(wav), c), self.segment_codes * c.mel_frames_per_code
        pending = []
        for first in range(0, frames, step):
            count = min(step, frames - first)
            codes = -(-count // c.mel_frames_per_code)
            wav_S, segment_ids_T = empty_row(self._bucket(codes) + guard_codes(c), c)
            write_frames(wav_S, segment_ids_T, 0, padded, first, count, 1, c)
            pending.append((codes, self._encode(self._variables, wav_S[None], segment_ids_T[None])))
        # Fetched only now, so that the device computes a segment while the host prepares the next.
        parts = [np.asarray(codes_BMR)[0, :codes, :num_levels] for codes, codes_BMR in pending]
        return np.concatenate(parts).astype(np.uint16)

    def decode(self, codes_MR: np.ndarray) -> np.ndarray:
        """Decodes one sequence of codes, in independent segments that are joined end to end.

        Args:
            codes_MR: integer codes [M, R] of the first R levels.

        Returns:
            float32 wave of 960 M samples. That may be up to 4 mel frames longer than what was encoded.

        Raises:
            ValueError: the array is not [M, R] with 1 <= R <= levels, or a code is not in its codebook.
        """
        sizes = self.config.rvq.codebook_sizes
        codes_MR = np.asarray(codes_MR)
        if codes_MR.ndim != 2 or not 1 <= codes_MR.shape[1] <= len(sizes) or codes_MR.dtype.kind not in "iu":
            raise ValueError(
                f"codes: expected integers [M, R] with 1 <= R <= {len(sizes)}, got {codes_MR.dtype} {codes_MR.shape}"
            )
        for level, size in enumerate(sizes[: codes_MR.shape[1]]):
            if len(codes_MR) and not 0 <= codes_MR[:, level].min() <= codes_MR[:, level].max() < size:
                raise ValueError(f"codes: level {level} has a code outside 0..{size - 1}")
        pending = []
        for first in range(0, len(codes_MR), self.segment_codes):
            part = codes_MR[first : first + self.segment_codes].astype(np.uint16)
            length = self._bucket(len(part))
            row = np.zeros((1, length, part.shape[1]), np.uint16)
            row[0, : len(part)] = part
            segment_ids = (np.arange(length) < len(part)).astype(np.int32)[None]
            q_BMD = self._dequantize(self._variables, row)
            pending.append((len(part), self._decode(self._variables, q_BMD, segment_ids)))
        per_code = self.config.samples_per_code
        parts = [np.asarray(wav_BS)[0, : codes * per_code] for codes, wav_BS in pending]
        return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)

    def num_codes(self, num_samples: int) -> int:
        """RVQ frames of a clip of `num_samples` samples."""
        return num_codes(num_samples, self.config)

    def _bucket(self, codes: int) -> int:
        return next(b for b in self._buckets if b >= codes)
