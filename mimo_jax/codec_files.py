"""Recordings to files of codes and back, as the verbs `codec encode` and `codec decode` do it.

A file of codes is an `.npz` with `codes` uint16 [M, R], `samples` (of the recording) and the codec's `segment_seconds`,
`quirks` (`reference_quirks`) and `fingerprint`. M RVQ frames, R levels.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import load_audio, save_wav_pieces
from mimo_jax.config import ConfigError
from mimo_jax.data.records import DataError
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.models.tokenizer.streaming import stream_decode
from mimo_jax.training.metrics import clock


@dataclass(frozen=True)
class CodesFile:
    """What a file of codes holds; see the head of this module."""

    codes_MR: np.ndarray
    samples: int
    segment_seconds: float
    quirks: bool
    fingerprint: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            codes=self.codes_MR,
            samples=self.samples,
            segment_seconds=self.segment_seconds,
            quirks=self.quirks,
            fingerprint=self.fingerprint,
        )
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
                codes_MR, samples, seconds = arrays["codes"], int(arrays["samples"]), float(arrays["segment_seconds"])
                quirks, fingerprint = bool(arrays["quirks"]), str(arrays["fingerprint"])
        except (KeyError, TypeError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: expected a file of codes, as `codec encode` writes it ({error})") from None
        if codes_MR.ndim != 2 or codes_MR.dtype != np.uint16:
            raise DataError(f"{path}: expected codes uint16 [M, R], got {codes_MR.dtype} {codes_MR.shape}")
        return CodesFile(codes_MR, samples, seconds, quirks, fingerprint)


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
        files: files of codes.
        load: from the keywords `segment_seconds` and `reference_quirks` to a codec.
        out: folder, made if missing.
        chunk_seconds: decode in steps of this length, as if the codes were coming in; with the published norm that
            gives another wave. By default segments are decoded whole.

    Raises:
        ConfigError: two files have one name, or the codes are another tokenizer's.
        DataError: a file is none of codes.
    """
    paths = _outputs(files, out, "-decoded.wav")
    contents = [CodesFile.load(file) for file in files]  # faults are found before the work
    load = functools.cache(load)
    codecs = [load(segment_seconds=c.segment_seconds, reference_quirks=c.quirks) for c in contents]
    for file, content, codec in zip(files, contents, codecs, strict=True):
        if content.fingerprint != codec.fingerprint:
            raise ConfigError(
                f"{file}: expected codes of the audio tokenizer {codec.fingerprint}, got {content.fingerprint}"
            )
    for path, file, content, codec in zip(paths, files, contents, codecs, strict=True):
        rate, step = codec.config.mel.sample_rate, codec.segment_codes
        if chunk_seconds is not None:
            step = max(1, round(chunk_seconds * codec.config.frame_rate))
        parts = (content.codes_MR[first : first + step] for first in range(0, len(content.codes_MR), step))
        waves = map(codec.decode, parts) if chunk_seconds is None else stream_decode(codec, parts, step)
        waves = _reported(waves, f"decode {file}", content.samples / rate, rate)
        save_wav_pieces(path, _cropped(waves, content.samples), rate)
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
    done, start = 0.0, time.monotonic()
    last = start

    def say() -> None:
        speed = done / max(now - start, 1e-9)
        left = clock((total - done) / max(speed, 1e-9))
        print(f"{name}: {clock(done)} of {clock(total)}, {speed:.1f} x real time, ETA {left}", file=sys.stderr)

    for part in parts:
        yield part
        done, now = min(done + len(part) / rate, total), time.monotonic()
        if now - last > 5:
            last = now
            say()
    now = time.monotonic()
    say()
