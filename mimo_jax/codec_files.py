"""Recordings to files of codes and back, as the verbs `codec encode` and `codec decode` do it.

A file of codes is an `.npz` with `codes` uint16 [M, R], `samples` (of the recording) and the codec's `segment_seconds`,
`quirks` (`reference_quirks`) and `fingerprint`. M RVQ frames, R levels.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import load_audio, save_wav_pieces
from mimo_jax.config import ConfigError
from mimo_jax.data.records import DataError
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.models.tokenizer.streaming import CodecStream, stream_deviation
from mimo_jax.progress import Meter, clock

# Of the arrays in a file: axes, dtype, and what they are for people.
_ARRAYS = {
    "codes": (2, np.uint16, "uint16 [M, R]"),
    "samples": (0, np.integer, "an integer"),
    "segment_seconds": (0, np.floating, "a number"),
    "quirks": (0, np.bool_, "a bool"),
    "fingerprint": (0, np.str_, "a text"),
}
# Streaming is compared with decoding at once on so much of a file at most.
_COMPARED_SECONDS = 60.0


@dataclass(frozen=True)
class CodesFile:
    """What a file of codes holds; see the head of this module. Raises DataError: a field is impossible."""

    codes: np.ndarray
    samples: int
    segment_seconds: float
    quirks: bool
    fingerprint: str

    def __post_init__(self) -> None:
        for name, (axes, dtype, expected) in _ARRAYS.items():
            value = np.asarray(getattr(self, name))
            if value.ndim != axes or not np.issubdtype(value.dtype, dtype):
                raise DataError(f"{name}: expected {expected}, got {value.dtype} {value.shape}")
        if self.samples < 0:
            raise DataError(f"samples: expected a number of samples, got {self.samples}")
        if not 1 <= self.segment_seconds <= 3600:
            raise DataError(f"segment_seconds: expected 1..3600, got {self.segment_seconds}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **vars(self))
        atomic_write(path, buffer.getvalue())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> CodesFile:
        """Reads a file.

        Raises:
            DataError: it is no file of codes.
            OSError: it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                values = {name: arrays[name] for name in _ARRAYS}
        except (KeyError, TypeError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: expected a file of codes, as `codec encode` writes it ({error})") from None
        try:
            return CodesFile(**{name: x if x.ndim else x.item() for name, x in values.items()})
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def encode_files(files: Sequence[str], codec: Codec, out: str, num_levels: int | None = None) -> list[Path]:
    """Encodes recordings into `out`/NAME.npz, with progress on stderr; returns the paths.

    Raises:
        ConfigError: two recordings have one name, or `num_levels` is impossible.
        AudioError: a recording cannot be read.
    """
    levels = codec.config.rvq.num_levels
    if num_levels is not None and not 1 <= num_levels <= levels:
        raise ConfigError(f"levels: expected 1..{levels}, got {num_levels}")
    paths = _outputs(files, out, ".npz")
    rate, codes_rate = codec.config.mel.sample_rate, codec.config.frame_rate
    for file, path in zip(files, paths, strict=True):
        wav = load_audio(file, rate, codec.config.resampler)
        parts = _reported(codec.encode_segments(wav, num_levels), f"encode {file}", len(wav) / rate, codes_rate)
        codes_MR, seconds = np.concatenate(list(parts)), codec.segment_codes / codes_rate
        CodesFile(codes_MR, len(wav), seconds, codec.reference_quirks, codec.fingerprint).save(path)
    return paths


def decode_files(
    files: Sequence[str], load: Callable[..., Codec], out: str, chunk_seconds: float | None = None
) -> list[Path]:
    """Decodes files of codes into `out`/NAME-decoded.wav, with progress on stderr; returns the paths.

    Args:
        load: from the keywords `segment_seconds` and `reference_quirks` to a codec.
        chunk_seconds: decode in steps of this length, as if the codes were coming in, and say how far streaming looks
            ahead; with the published norm it gives another wave, and how far the first minute is off is measured and
            said too. By default segments are decoded whole.

    Raises:
        ConfigError: two files have one name, or the codes are another tokenizer's.
        DataError: a file is none of codes, or holds codes that the tokenizer has not.
    """
    paths = _outputs(files, out, "-decoded.wav")
    contents = [CodesFile.load(file) for file in files]  # faults are found before the work
    load = functools.cache(load)
    codecs = [load(segment_seconds=c.segment_seconds, reference_quirks=c.quirks) for c in contents]
    for file, content, codec in zip(files, contents, codecs, strict=True):
        if content.fingerprint != codec.fingerprint:
            expected, got = codec.fingerprint, content.fingerprint
            raise ConfigError(f"{file}: expected codes of the audio tokenizer {expected}, got {got}")
        longest = len(content.codes) * codec.config.samples_per_code
        if content.samples > longest:
            raise DataError(f"{file}: samples: expected at most {longest}, as the codes give, got {content.samples}")
        try:
            codec.check_codes(content.codes)
        except ValueError as error:
            raise DataError(f"{file}: {error}") from None
    for path, file, content, codec in zip(paths, files, contents, codecs, strict=True):
        rate, step = codec.config.mel.sample_rate, codec.segment_codes
        stream = None
        if chunk_seconds is not None:
            step = max(1, round(chunk_seconds * codec.config.frame_rate))
            stream = CodecStream(codec, step)
            print(f"decode {file}: streamed, looking {stream.look_ahead_seconds:.2f} s ahead", file=sys.stderr)
        parts = (content.codes[first : first + step] for first in range(0, len(content.codes), step))
        waves = stream.decode(parts) if stream else map(codec.decode, parts)
        waves = _reported(waves, f"decode {file}", content.samples / rate, rate)
        save_wav_pieces(path, _cropped(waves, content.samples), rate)
        if stream and codec.config.decoder_norm == "sequence" and len(content.codes):
            compared = content.codes[: round(_COMPARED_SECONDS * codec.config.frame_rate)]
            off = stream_deviation(codec, compared, step)
            print(
                f"decode {file}: decoder_norm `sequence` sees less when streamed; the first "
                f"{len(compared) / codec.config.frame_rate:.1f} s differ from decoding at once by at most "
                f"{off.max_abs:.3g}, RMS {off.rms:.3g} (signal {off.signal_rms:.3g})",
                file=sys.stderr,
            )
    return paths


def _outputs(files: Sequence[str], out: str, ending: str) -> list[Path]:
    names = [Path(file).stem for file in files]
    if len(set(names)) < len(names):
        raise ConfigError(f"files: expected different names, got {names}")
    return [Path(out) / f"{name}{ending}" for name in names]


def _cropped(waves: Iterable[np.ndarray], samples: int) -> Iterator[np.ndarray]:
    for wav in waves:
        yield wav[:samples]
        samples -= min(samples, len(wav))


def _reported(parts: Iterable[np.ndarray], name: str, total: float, rate: float) -> Iterator[np.ndarray]:
    """The same parts, `rate` entries a second; says on stderr, every 5 s, how many of `total` seconds are done."""
    meter = Meter(total, lambda done, speed: f"{name}: {clock(done)} of {clock(total)}, {speed:.1f} x real time")
    left = total
    for part in parts:
        yield part
        meter.step(done := min(len(part) / rate, left))
        left -= done
    meter.say()
