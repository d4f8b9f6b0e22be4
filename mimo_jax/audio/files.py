"""Reading, resampling and writing audio files.

libsndfile reads WAV, FLAC, Ogg, MP3, AIFF and more; anything else (M4A, G.722, video files) goes through PyAV where
that is installed. Waves are float32 [S], mono, nominally in -1..1, times in seconds, rates in Hz.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mimo_jax.atomic import atomic_stream
from mimo_jax.audio.sinc import resample_sinc

if TYPE_CHECKING:
    import soundfile

MIN_RATE, MAX_RATE = 4_000, 768_000

# libsndfile's log has such a line for a chunk (of WAV, AIFF, W64, AU) whose declared size is not what the file holds.
_WRONG_SIZE = re.compile(r"^\s*(?:RIFF|data|FORM|SSND|riff|Data Size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 0x7FFF_F000  # programs that write to a pipe declare a size at or above this


class AudioError(ValueError):
    """An audio file is missing, empty, truncated, broken or of an impossible rate; the message says which."""


def audio_length(path: str | os.PathLike[str], sample_rate: int) -> int:
    """Samples that `load_audio` returns, from the header where libsndfile reads the file, else by decoding it.

    Raises:
        AudioError: as `load_audio`, except for faults that only decoding finds.
    """
    file = _existing(path)
    try:
        with _open_sndfile(file) as sound:
            rate, frames = sound.samplerate, sound.frames
            _check_declared_sizes(file, sound.extra_info)
    except _NotSndfile as error:
        samples_SC, rate = _decode_av(file, str(error))
        frames = len(samples_SC)
    _check(file, rate, frames)
    return -(-frames * sample_rate // rate)


def load_audio(
    path: str | os.PathLike[str], sample_rate: int = 24_000, resampler: Literal["soxr", "sinc"] = "soxr"
) -> np.ndarray:
    """Reads a file as mono (mean of the channels) at `sample_rate`: float32 [S].

    Args:
        resampler: `soxr` (see `resample`), or `sinc`, which the published models' inputs went through.

    Raises:
        AudioError: the file is missing, empty, truncated, in no known format or holds a value that is not finite, or
            its rate is outside 4..768 kHz. (A truncated Ogg or raw file cannot be told from a shorter one.)
    """
    file = _existing(path)
    try:
        with _open_sndfile(file) as sound:
            rate, declared = sound.samplerate, sound.frames
            _check_declared_sizes(file, sound.extra_info)
            samples_SC = _read_sndfile(file, sound)
    except _NotSndfile as error:
        samples_SC, rate = _decode_av(file, str(error))
        declared = len(samples_SC)
    if len(samples_SC) < declared:
        raise AudioError(f"{file}: truncated: expected {declared} samples, got {len(samples_SC)}")
    _check(file, rate, len(samples_SC))
    if not np.isfinite(samples_SC).all():
        first = int(np.argmin(np.isfinite(samples_SC).all(axis=1)))
        raise AudioError(f"{file}: expected finite samples, got a value that is not at sample {first}")
    wav_S = samples_SC[:, 0] if samples_SC.shape[1] == 1 else samples_SC.mean(axis=1, dtype=np.float32)
    return (resample if resampler == "soxr" else resample_sinc)(wav_S, rate, sample_rate)


def resample(wav: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resamples float [S] with soxr ("HQ"): float32 [ceil(S * target_rate / source_rate)].

    The released code uses a short windowed-sinc interpolator (`resample_sinc`). soxr's filter is far longer: flat up to
    0.91 of the lower Nyquist frequency, -40 dB at 0.98 and below -130 dB beyond 1, where the short filter falls
    gradually and lets images through. So the upper end of the band differs; below 0.85 of that frequency the two agree
    within 0.6 % rms on recorded speech. Lengths are equal.
    """
    wav = np.ascontiguousarray(wav, np.float32)
    if source_rate == target_rate:
        return wav
    import soxr

    length = -(-len(wav) * target_rate // source_rate)
    out = np.asarray(soxr.resample(wav, source_rate, target_rate, quality="HQ"), np.float32)
    return np.pad(out, (0, max(0, length - len(out))))[:length]


def save_wav(path: str | os.PathLike[str], wav: np.ndarray, sample_rate: int) -> None:
    """Writes a mono wave as 16-bit PCM WAV, atomically; values beyond -1..1 are clipped.

    Args:
        wav: float [S]. A wave that was read from 16-bit PCM is written back without loss.

    Raises:
        AudioError: the wave is not one-dimensional or not finite, or the rate is impossible.
        OSError: the file cannot be written; a file that was there is unchanged.
    """
    save_wav_pieces(path, [wav], sample_rate)


def save_wav_pieces(path: str | os.PathLike[str], pieces: Iterable[np.ndarray], sample_rate: int) -> None:
    """`save_wav` of a wave that comes in pieces, of which only one is in memory at a time."""
    import soundfile

    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise AudioError(f"{path}: expected a sample rate of {MIN_RATE}..{MAX_RATE} Hz, got {sample_rate}")
    with (
        atomic_stream(path) as stream,
        soundfile.SoundFile(stream, "w", sample_rate, 1, format="WAV", subtype="PCM_16") as sound,
    ):
        for piece in pieces:
            wav = np.asarray(piece)
            if wav.ndim != 1:
                raise AudioError(f"{path}: expected a wave of shape [S], got {list(wav.shape)}")
            if not np.isfinite(wav).all():
                raise AudioError(f"{path}: expected finite samples")
            pcm = np.clip(np.rint(wav.astype(np.float64) * 32_768.0), -32_768, 32_767)
            sound.write(pcm.astype(np.int16))


# ----------------------------------------------------------------------------------------------------------
# Decoders


class _NotSndfile(Exception):
    """libsndfile does not know the format."""


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except FileNotFoundError:
        raise AudioError(f"{file}: no such audio file") from None
    except OSError as error:
        raise AudioError(f"{file}: cannot be read ({error.strerror})") from None
    if empty:
        raise AudioError(f"{file}: empty file, expected audio")
    return file


def _check(file: Path, rate: int, frames: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{file}: expected a sample rate of {MIN_RATE}..{MAX_RATE} Hz, got {rate}")
    if frames == 0:
        raise AudioError(f"{file}: expected audio, got no samples")


def _check_declared_sizes(file: Path, log: str) -> None:
    for declared, found in _WRONG_SIZE.findall(log):
        # A missing pad byte or a size that leaves out a header is common and harmless.
        if int(found) + 16 < int(declared) < _STREAMED:
            raise AudioError(f"{file}: truncated: its header declares {declared} bytes, the file holds {found}")


def _open_sndfile(file: Path) -> soundfile.SoundFile:
    import soundfile

    try:
        return soundfile.SoundFile(file)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a name that means "raw samples"
        raise _NotSndfile(str(error)) from None


def _read_sndfile(file: Path, sound: soundfile.SoundFile) -> np.ndarray:
    import soundfile

    try:
        return np.asarray(sound.read(dtype="float32", always_2d=True), np.float32)
    except soundfile.SoundFileError as error:
        raise AudioError(f"{file}: truncated or broken ({error})") from None


def _decode_av(file: Path, sndfile_error: str) -> tuple[np.ndarray, int]:
    """Decodes the first audio stream: float32 [S, channels] and the rate."""
    try:
        import av
    except ImportError:
        reason = f"libsndfile cannot read it ({sndfile_error})"
        raise AudioError(f"{file}: {reason}; for other formats install PyAV (extra `eval`)") from None
    try:
        # Local files only: a playlist must not make the decoder fetch anything.
        with av.open(f"file:{file.resolve()}", options={"protocol_whitelist": "file"}) as container:
            if not container.streams.audio:
                raise AudioError(f"{file}: expected an audio stream, got none")
            stream = container.streams.audio[0]
            rate = int(stream.rate or 0)
            planar = av.AudioResampler(format="fltp")
            parts = [part.to_ndarray() for frame in container.decode(stream) for part in planar.resample(frame)]
            parts += [part.to_ndarray() for part in planar.resample(None)]
    except av.error.FFmpegError as error:
        raise AudioError(f"{file}: libsndfile ({sndfile_error}) and FFmpeg ({error.strerror}) cannot read it") from None
    samples_CS = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0))
    return np.ascontiguousarray(samples_CS.T, np.float32), rate
