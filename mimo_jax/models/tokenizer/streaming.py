"""Decoding while codes come in.

`ReferenceStream` is the released code's scheme: each call decodes the frames kept from before and the new ones from
scratch, and returns what has `right_overlap` frames after it. The published decoder normalises over the whole sequence
(`decoder_norm` "sequence"), so what this gives differs from decoding at once; `stream_deviation` says by how much.

With `decoder_norm` "frame" nothing depends on what is far away, and `CodecStream` decodes exactly: the causal decoder
keeps keys and values, the vocoder runs over the new frames and those that its attention windows reach. It looks ahead
`right` frames in each of its layers, 16 x 10 mel frames = 1.6 s at the published size, and the overlap of the inverse
STFT 2 more.

Either way a stream begins anew at each independent segment of the codec (60 s), as decoding at once does.

S samples, T mel frames (100 Hz), M RVQ frames (25 Hz), R levels, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import AudioTokenizerConfig, ComputeConfig, ConfigError
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.models.tokenizer.decoder import DecoderPast
from mimo_jax.models.transformer import KVCache

# As released, in RVQ frames.
LEFT_OVERLAP, RIGHT_OVERLAP = 250, 40


class ReferenceStream:
    """The released streaming decode of one or more sequences side by side.

    With a codec of `reference_quirks` the sequences of a call are one padded batch: they change each other, and the
    last call returns a shorter one to the end of the longest, which is no audio.

    Attributes:
        processed_lengths: of the frames kept for each sequence, how many have been returned.
    """

    def __init__(self, codec: Codec, left_overlap: int = LEFT_OVERLAP, right_overlap: int = RIGHT_OVERLAP) -> None:
        """Takes a codec; at most `left_overlap` frames are kept, and `right_overlap` (not more) are held back.

        Raises:
            ConfigError: the overlaps are impossible.
        """
        if not 0 <= right_overlap <= left_overlap or left_overlap < 1:
            raise ConfigError(f"overlaps: expected 0 <= right <= left frames, got {right_overlap} and {left_overlap}")
        self._codec, self._left, self._right = codec, left_overlap, right_overlap
        self._kept: list[np.ndarray] = []
        self.processed_lengths: list[int] = []

    @property
    def cache_lengths(self) -> list[int]:
        """Frames kept of each sequence."""
        return [len(kept) for kept in self._kept]

    def push(self, codes: Sequence[np.ndarray], last: bool = False) -> list[np.ndarray | None]:
        """Decodes the next frames of every sequence.

        Args:
            codes: new codes [M_i, R] of each sequence; as many sequences in every call, M_i may be 0.
            last: return everything to the end.

        Returns:
            float32 wave of each sequence; None as long as it has not more than `right_overlap` frames.

        Raises:
            ValueError: another number of sequences, or bad codes (see `Codec.decode`).
        """
        if not self._kept:
            self._kept = [np.zeros((0, np.shape(c)[1]), np.uint16) for c in codes]
            self.processed_lengths = [0] * len(codes)
        held = [np.concatenate([kept, c]) for kept, c in zip(self._kept, codes, strict=True)]
        waves = self._codec.decode_batch(held)
        per_code = self._codec.config.samples_per_code
        out: list[np.ndarray | None] = []
        for i, (frames, wav) in enumerate(zip(held, waves, strict=True)):
            start, end = self.processed_lengths[i], len(frames) - self._right
            if last:
                out.append(wav[start * per_code :])
                self.processed_lengths[i] = len(frames)
            elif end <= 0:
                out.append(None)
            else:
                out.append(wav[start * per_code : end * per_code])
                dropped = max(0, len(frames) - self._left)
                frames, self.processed_lengths[i] = frames[dropped:], end - dropped
            self._kept[i] = frames
        return out


class CodecStream:
    """Decodes one sequence of any length in bounded memory and a few compiled programs.

        stream = CodecStream(codec)
        for codes_MR in ...:
            play(stream.push(codes_MR))
        play(stream.finish())  # or all of it: for wav in stream.decode(codes): play(wav)

    All pieces together are as long as `codec.decode` of all codes, and with `decoder_norm` "frame" equal to it up to
    rounding. The published norm goes through `ReferenceStream`, segment by segment.

    Attributes:
        look_ahead_seconds: audio that must be known after a sample before it is returned: 1.62 s at the published size
            with norm `frame`; 1.6 s, the right overlap, with the published norm.
        latency_seconds: the same with the chunk that is waited for.
    """

    def __init__(
        self,
        codec: Codec,
        chunk_codes: int = 25,
        left_overlap: int = LEFT_OVERLAP,
        right_overlap: int = RIGHT_OVERLAP,
    ) -> None:
        """Takes a codec.

        Args:
            codec: audio tokenizer.
            chunk_codes: RVQ frames that are decoded at a time; more cost less work per frame.
            left_overlap: RVQ frames that are decoded again for each chunk; norm `sequence` only.
            right_overlap: RVQ frames that are held back; norm `sequence` only.

        Raises:
            ConfigError: an impossible size, or (norm `frame`) the decoder is not causal or the vocoder looks ahead
                without limit.
        """
        if chunk_codes < 1:
            raise ConfigError(f"chunk_codes: expected a positive integer, got {chunk_codes}")
        config = codec.config
        self._codec, self._chunk = codec, min(chunk_codes, codec.segment_codes)
        self._decoder: _FrameDecoder | _OverlapDecoder
        if config.decoder_norm == "frame":
            self._decoder = _FrameDecoder(codec, self._chunk)
            self.look_ahead_seconds = self._decoder.right * config.mel.hop_length / config.mel.sample_rate
        else:
            self._decoder = _OverlapDecoder(lambda: ReferenceStream(codec, left_overlap, right_overlap))
            self.look_ahead_seconds = right_overlap / config.frame_rate
            ReferenceStream(codec, left_overlap, right_overlap)  # raises now
        self.latency_seconds = self.look_ahead_seconds + self._chunk / config.frame_rate
        self._waiting: np.ndarray | None = None
        self._position = 0  # in the segment

    def push(self, codes_MR: np.ndarray) -> np.ndarray:
        """Takes the next codes [M, R] and returns the wave that they complete: float32 [S], often empty.

        Raises:
            ValueError: bad codes (see `Codec.decode`), or another number of levels than before.
        """
        codes_MR = self._codec.check_codes(codes_MR)
        if self._waiting is None:
            self._waiting = codes_MR[:0]
        if codes_MR.shape[1] != self._waiting.shape[1]:
            raise ValueError(f"codes: expected {self._waiting.shape[1]} levels as before, got {codes_MR.shape[1]}")
        waiting = np.concatenate([self._waiting, codes_MR])
        waves = []
        first = 0
        while (count := min(self._chunk, self._codec.segment_codes - self._position)) <= len(waiting) - first:
            waves.append(self._step(waiting[first : first + count]))
            first += count
        self._waiting = waiting[first:]
        return _joined(waves)

    def finish(self) -> np.ndarray:
        """Returns the rest, float32 [S]; the next `push` begins a new sequence."""
        waves = []
        if self._waiting is not None and len(self._waiting):
            waves.append(self._step(self._waiting))
        waves.append(self._decoder.flush())
        self._waiting, self._position = None, 0
        return _joined(waves)

    def decode(self, codes: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Decodes codes [M_i, R] as they come: yields float32 waves as soon as there is something."""
        for codes_MR in codes:
            if len(wav := self.push(codes_MR)):
                yield wav
        if len(wav := self.finish()):
            yield wav

    def _step(self, codes_MR: np.ndarray) -> np.ndarray:
        start = self._position
        self._position = (start + len(codes_MR)) % self._codec.segment_codes
        return self._decoder.step(codes_MR, start, ends=self._position == 0)


def look_ahead_frames(config: AudioTokenizerConfig) -> int:
    """Mel frames after a sample that norm `frame` needs for it: 10 in each vocoder layer and 2 of the inverse STFT."""
    return config.vocoder.window[1] * config.vocoder.num_layers + _istft_reach(config)


def _istft_reach(config: AudioTokenizerConfig) -> int:
    """Frames on either side whose inverse transform overlaps the samples of a frame."""
    return -(-((config.mel.n_fft - config.mel.hop_length) // 2) // config.mel.hop_length)


@dataclass(frozen=True)
class Deviation:
    """Streamed against decoded at once: largest and root mean square difference, and that of the wave itself."""

    max_abs: float
    rms: float
    signal_rms: float


def stream_deviation(codec: Codec, codes_MR: np.ndarray, chunk_codes: int = 25) -> Deviation:
    """How far streaming is from `codec.decode`, in memory that does not grow with the length.

    With `decoder_norm` "frame" that is rounding; with the published norm it is the scheme's.

    Raises:
        ValueError: there are no codes, or bad ones.
    """
    step = codec.segment_codes
    segments = [codes_MR[first : first + step] for first in range(0, len(codes_MR), step)]
    streamed = CodecStream(codec, chunk_codes).decode(segments)
    got = np.zeros(0, np.float32)
    largest = error = energy = 0.0
    for segment in segments:
        expected = codec.decode(segment)
        while len(got) < len(expected):
            got = np.concatenate([got, next(streamed)])
        difference = got[: len(expected)].astype(np.float64) - expected
        got = got[len(expected) :]
        largest = max(largest, float(np.abs(difference).max()))
        error, energy = error + float(np.sum(difference**2)), energy + float(np.sum(expected.astype(np.float64) ** 2))
    samples = len(codes_MR) * codec.config.samples_per_code
    if not samples:
        raise ValueError("codes: expected at least one RVQ frame, got none")
    return Deviation(largest, math.sqrt(error / samples), math.sqrt(energy / samples))


def _joined(waves: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(waves) if waves else np.zeros(0, np.float32)


class _OverlapDecoder:
    """The published scheme, a new stream for each segment."""

    def __init__(self, new_stream: Callable[[], ReferenceStream]) -> None:
        self._new_stream = new_stream
        self._stream: ReferenceStream | None = None
        self._levels = 0

    def step(self, codes_MR: np.ndarray, start: int, ends: bool) -> np.ndarray:
        if start == 0:
            self._stream, self._levels = self._new_stream(), codes_MR.shape[1]
        return self._push(codes_MR, ends)

    def flush(self) -> np.ndarray:
        return self._push(np.zeros((0, self._levels), np.uint16), True) if self._stream is not None else _joined([])

    def _push(self, codes_MR: np.ndarray, last: bool) -> np.ndarray:
        assert self._stream is not None
        (wav,) = self._stream.push([codes_MR], last)
        if last:
            self._stream = None
        return _joined([] if wav is None else [wav])


class _FrameDecoder:
    """The causal decoder with its keys and values, and the vocoder on a window of mel frames.

    Segments follow each other in the window as they do in packed rows, so a new one does not wait for the one before.
    """

    def __init__(self, codec: Codec, chunk: int) -> None:
        c = codec.config
        before, after = c.vocoder.window
        if not c.decoder.causal or after < 0:
            raise ConfigError(
                "streaming: expected a causal decoder and a vocoder with a limited right window, got "
                f"decoder.causal {c.decoder.causal} and vocoder.window {c.vocoder.window}"
            )
        segment = codec.segment_codes * c.mel_frames_per_code
        self.right = min(look_ahead_frames(c), segment)
        left = segment if before < 0 else min(before * c.vocoder.num_layers + _istft_reach(c), segment)
        self._codec, self._chunk, self._frames = codec, chunk, chunk * c.mel_frames_per_code
        self._run = _program(c, codec.compute, left, self._frames)
        self._left, self._ids_T = left, np.zeros(left + self._frames + self.right, np.int32)
        dtype = jnp.dtype(codec.compute.dtype)
        # Room for a whole segment, the padding of its last chunk included.
        slots = -(-codec.segment_codes // chunk) * chunk * c.pool
        past = DecoderPast(KVCache.zeros(c.decoder, 1, slots, dtype), jnp.zeros((1, 1, c.decoder.d_model), dtype))
        self._state = (past, jnp.zeros((1, len(self._ids_T), c.mel.n_mels), dtype))
        self._segment, self._levels = 0, 1

    def step(self, codes_MR: np.ndarray, start: int, ends: bool) -> np.ndarray:
        del ends
        self._segment += start == 0
        self._levels = codes_MR.shape[1]
        return self._advance(codes_MR, start)

    def flush(self) -> np.ndarray:
        waves = []
        while self._ids_T[self._left + self._frames :].any():
            waves.append(self._advance(np.zeros((0, self._levels), np.uint16), 0))
        return _joined(waves)

    def _advance(self, codes_MR: np.ndarray, start: int) -> np.ndarray:
        """Shifts the window by a chunk that begins with `codes_MR`; returns the samples that are ready."""
        c = self._codec.config
        row = np.zeros((1, self._chunk, codes_MR.shape[1]), np.uint16)
        row[0, : len(codes_MR)] = codes_MR
        real = np.arange(self._frames) < len(codes_MR) * c.mel_frames_per_code
        self._ids_T = np.concatenate([self._ids_T[self._frames :], np.where(real, self._segment, 0).astype(np.int32)])
        wav_S, self._state = self._run(self._codec.variables, row, np.int32(start), self._ids_T[None], self._state)
        ready_T = self._ids_T[self._left : self._left + self._frames] > 0
        return np.asarray(wav_S, np.float32)[np.repeat(ready_T, c.mel.hop_length)]


@functools.lru_cache(maxsize=8)
def _program(config: AudioTokenizerConfig, compute: ComputeConfig, left: int, frames: int) -> Callable[..., Any]:
    """Compiled (variables, codes_1MR, position in the segment, ids_1T, state) -> (wave [S] of `frames` frames, state).

    The state is the decoder's past and the mel frames of the window.
    """
    model, hop = AudioTokenizer(config, compute), config.mel.hop_length

    def step(model: AudioTokenizer, codes_1MR, start, ids_1T, state):
        past, mel_1TF = state
        past = past.replace(cache=past.cache.replace(lengths_B=start[None] * config.pool))
        new_1TF, past = model.decoder.step(model.dequantize(codes_1MR.astype(jnp.int32)), past)
        mel_1TF = jnp.concatenate([mel_1TF[:, frames:], new_1TF], axis=1)
        wav_1S = model.vocoder(mel_1TF, ids_1T)
        return wav_1S[0, left * hop : (left + frames) * hop], (past, mel_1TF)

    def run(variables, codes_1MR, start, ids_1T, state):
        return model.apply(variables, codes_1MR, start, ids_1T, state, method=step)

    return jax.jit(run, donate_argnums=4)
