"""The audio tokenizer as a codec: NumPy waves in, NumPy codes out, and back.

S samples (24 kHz), M RVQ frames (25 Hz), R levels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.audio.packing import empty_row, guard_codes, num_codes, num_mel_frames, reflect_pad, write_frames
from mimo_jax.config import AudioTokenizerConfig, ComputeConfig
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.models.tokenizer.reference import packed_extents

# Clip lengths that programs are compiled for, when first needed; the longest is a segment.
BUCKET_SECONDS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0)

FLOAT32 = ComputeConfig()


class Codec:
    """Encodes and decodes clips of any length with a few compiled programs.

    A clip is cut into independent segments (60 s, as published), each of which is padded to the next bucket and run in
    a row of its own. So on one machine its codes are a function of the clip alone, bit for bit: not of the clips beside
    it, nor of the order of calls.

    With `reference_quirks` the segments of all clips of a call are one batch as the released code packs it, whose
    artefacts `reference` describes: then codes and waves do depend on the neighbours.
    """

    def __init__(
        self,
        config: AudioTokenizerConfig,
        params: Mapping[str, Any],
        codebook: Mapping[str, Any],
        compute: ComputeConfig = FLOAT32,
        segment_seconds: float = 60.0,
        reference_quirks: bool = False,
    ) -> None:
        """Takes a trained tokenizer.

        Args:
            config: the audio tokenizer.
            params: its parameters, unboxed.
            codebook: its codebook collection.
            compute: precision; `scan_layers` must be that of `params`.
            segment_seconds: length of a segment, rounded to whole RVQ frames. Codes of longer clips depend on it (the
                released evaluation suite and fine-tuning toolkit cut at 30 s).
            reference_quirks: reproduce the artefacts of the released code's batching.

        Raises:
            ValueError: a segment would have no RVQ frame.
        """
        self.config, self.compute, self.reference_quirks = config, compute, reference_quirks
        self.segment_codes = round(segment_seconds * config.frame_rate)
        if self.segment_codes < 1:
            raise ValueError(f"segment_seconds: expected at least one RVQ frame, got {segment_seconds}")
        # A clip of exactly 10 s has one RVQ frame more than 250, since its mel frames stand at both ends.
        buckets = {round(seconds * config.frame_rate) + 1 for seconds in BUCKET_SECONDS}
        self._buckets = [*sorted(b for b in buckets if 0 < b < self.segment_codes), self.segment_codes]
        self.variables = jax.device_put({"params": params, "codebook": codebook})
        model = AudioTokenizer(config, compute)

        def encode(variables: Any, wav_BS: jax.Array, ids_BT: jax.Array, extent_BT: jax.Array | None) -> jax.Array:
            return model.apply(variables, wav_BS, ids_BT, extent_BT=extent_BT, method="encode")

        def dequantize(variables: Any, codes_BMR: jax.Array) -> jax.Array:
            return model.apply(variables, codes_BMR.astype(jnp.int32), method="dequantize")

        def decode(variables: Any, q_BMD: jax.Array, ids_BM: jax.Array, extent_BM: jax.Array | None) -> jax.Array:
            return model.apply(variables, q_BMD, ids_BM, extent_BM, method="decode_features")

        # Two programs for decoding, so that another number of levels costs only a new small one.
        self._encode, self._dequantize, self._decode = jax.jit(encode), jax.jit(dequantize), jax.jit(decode)

    @functools.cached_property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of a SHA-256 over all that codes depend on: settings, encoder and codebooks.

        Training decoder and vocoder further (stage 2) does not change it: shards made before stay valid.
        """
        c, variables = self.config, self.variables
        settings = [dataclasses.asdict(c.mel), dataclasses.asdict(c.encoder), c.rvq.codebook_sizes, c.rvq.epsilon]
        settings += [c.encoder_skip_layer, c.stem_stride, c.pool, self.segment_codes]
        settings += ["reference_quirks"] * self.reference_quirks
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        entries = {name: level["entries"] for name, level in variables["codebook"].items()}
        arrays = {"encoder": variables["params"]["encoder"], "codebook": entries}
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
        if not self.reference_quirks:
            return [np.concatenate(list(self.encode_segments(wav, num_levels))) for wav in wavs]
        clips = list(wavs)
        counts = [[count for _, count in self._segments(len(wav))] for wav in clips]
        extents = iter(packed_extents([count for of_clip in counts for count in of_clip]))
        return [
            np.concatenate(list(self.encode_segments(wav, num_levels, [next(extents) for _ in of_clip])))
            for wav, of_clip in zip(clips, counts, strict=True)
        ]

    def row_shapes(self, num_samples: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the row, wave and segment ids, in which the longest segment of a clip is encoded."""
        frames = max(count for _, count in self._segments(num_samples))
        codes = self._bucket(-(-frames // self.config.mel_frames_per_code)) + guard_codes(self.config)
        wav_S, ids_T = empty_row(codes, self.config)
        return jax.ShapeDtypeStruct((1, *wav_S.shape), wav_S.dtype), jax.ShapeDtypeStruct(
            (1, *ids_T.shape), ids_T.dtype
        )

    def program(self, variables: Any, wav_BS: Any, segment_ids_BT: Any) -> Any:
        """The program that encodes rows, traced for arrays of such shapes."""
        return self._encode.trace(variables, wav_BS, segment_ids_BT, None)

    def _segments(self, num_samples: int) -> list[tuple[int, int]]:
        """First mel frame and number of mel frames of each segment of a clip."""
        frames, step = num_mel_frames(num_samples, self.config), self.segment_codes * self.config.mel_frames_per_code
        return [(first, min(step, frames - first)) for first in range(0, frames, step)]

    def encode_segments(
        self, wav: np.ndarray, num_levels: int | None = None, extents: Sequence[int] | None = None
    ) -> Iterator[np.ndarray]:
        """Encodes one clip and yields the codes [M_i, R] of its segments one after the other; see `encode`.

        `extents` are, for `reference_quirks`, the mel frames of the longest segment in the batch of each segment; by
        default the clip is a batch of its own.
        """
        c = self.config
        padded = reflect_pad(np.asarray(wav, np.float32), c)
        if not np.isfinite(padded).all():
            raise ValueError("wav: expected finite samples, got NaN or infinity")

        def fetched(codes: int, codes_BMR: jax.Array) -> np.ndarray:
            return np.asarray(codes_BMR)[0, :codes, :num_levels].astype(np.uint16)

        segments = self._segments(len(wav))
        if self.reference_quirks and extents is None:
            extents = packed_extents([count for _, count in segments])
        pending: list[tuple[int, jax.Array]] = []
        for i, (first, count) in enumerate(segments):
            codes = -(-count // c.mel_frames_per_code)
            longest = codes if extents is None else -(-extents[i] // c.mel_frames_per_code)
            wav_S, segment_ids_T = empty_row(self._bucket(longest) + guard_codes(c), c)
            write_frames(wav_S, segment_ids_T, 0, padded, first, count, 1, c)
            extent = None if extents is None else _first(extents[i], len(segment_ids_T))
            pending.append((codes, self._encode(self.variables, wav_S[None], segment_ids_T[None], extent)))
            # Fetched one late, so that the device computes a segment while the host prepares the next.
            if len(pending) > 1:
                yield fetched(*pending.pop(0))
        yield fetched(*pending.pop(0))

    def decode(self, codes_MR: np.ndarray) -> np.ndarray:
        """Decodes one sequence of codes, in independent segments that are joined end to end.

        Args:
            codes_MR: integer codes [M, R] of the first R levels.

        Returns:
            float32 wave of 960 M samples. That may be up to 4 mel frames longer than what was encoded.

        Raises:
            ValueError: the array is not [M, R] with 1 <= R <= levels, or a code is not in its codebook.
        """
        codes_MR = self.check_codes(codes_MR)
        starts = range(0, len(codes_MR), self.segment_codes)
        return self._join([self._decode_row(codes_MR[first : first + self.segment_codes]) for first in starts])

    def decode_batch(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Decodes several sequences, none of them cut into segments; arguments and errors as for `decode`.

        Returns:
            One wave for each: 960 M_i samples, or with `reference_quirks` as many as the longest has. What the released
            code returns beyond the end of a shorter one is no audio.
        """
        checked = [self.check_codes(c) for c in codes]
        extent = max(map(len, checked), default=0) if self.reference_quirks else None
        pending = [self._decode_row(c, extent) for c in checked]
        return [self._join([row]) for row in pending]

    def check_codes(self, codes_MR: np.ndarray) -> np.ndarray:
        """The codes as uint16; raises ValueError as `decode` does."""
        sizes = self.config.rvq.codebook_sizes
        codes_MR = np.asarray(codes_MR)
        if codes_MR.ndim != 2 or not 1 <= codes_MR.shape[1] <= len(sizes) or codes_MR.dtype.kind not in "iu":
            raise ValueError(
                f"codes: expected integers [M, R] with 1 <= R <= {len(sizes)}, got {codes_MR.dtype} {codes_MR.shape}"
            )
        for level, size in enumerate(sizes[: codes_MR.shape[1]]):
            if len(codes_MR) and not 0 <= codes_MR[:, level].min() <= codes_MR[:, level].max() < size:
                raise ValueError(f"codes: level {level} has a code outside 0..{size - 1}")
        return codes_MR.astype(np.uint16)

    def dequantize(self, codes_MR: np.ndarray) -> np.ndarray:
        """What the decoder reads: the sum of the entries that the codes [M, R] of the first R levels name.

        Returns:
            float32 [M, D].

        Raises:
            ValueError: as `decode`.
        """
        codes_MR = self.check_codes(codes_MR)
        row = np.zeros((1, self._bucket(len(codes_MR)), codes_MR.shape[1]), np.uint16)
        row[0, : len(codes_MR)] = codes_MR
        return np.asarray(self._dequantize(self.variables, row))[0, : len(codes_MR)].astype(np.float32)

    def _decode_row(self, codes_MR: np.ndarray, extent: int | None = None) -> tuple[int, jax.Array]:
        """RVQ frames of the answer, and the wave on the device."""
        count = len(codes_MR) if extent is None else extent
        length = self._bucket(count)
        row = np.zeros((1, length, codes_MR.shape[1]), np.uint16)
        row[0, : len(codes_MR)] = codes_MR
        q_BMD = self._dequantize(self.variables, row)
        extent_BM = None if extent is None else _first(extent, length)
        return count, self._decode(self.variables, q_BMD, _first(len(codes_MR), length), extent_BM)

    def _join(self, pending: list[tuple[int, jax.Array]]) -> np.ndarray:
        per_code = self.config.samples_per_code
        parts = [np.asarray(wav_BS)[0, : codes * per_code] for codes, wav_BS in pending]
        return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)

    def num_codes(self, num_samples: int) -> int:
        """RVQ frames of a clip of `num_samples` samples."""
        return num_codes(num_samples, self.config)

    def _bucket(self, codes: int) -> int:
        multiple = -(-codes // self.segment_codes) * self.segment_codes
        return next((b for b in self._buckets if b >= codes), multiple)


def _first(count: int, length: int) -> np.ndarray:
    """Ids [1, length] of a row whose first `count` positions are one segment."""
    return (np.arange(length) < count).astype(np.int32)[None]
