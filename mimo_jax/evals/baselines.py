"""What a reconstruction is compared with: Opus, and the tokenizer's own mel spectrogram turned back into sound.

S samples, T frames, F bins, N samples of a frame, C mel bins.
"""

from __future__ import annotations

import functools
import io

import numpy as np

from mimo_jax.audio.features import hann_window, mel_filterbank
from mimo_jax.audio.files import resample
from mimo_jax.config import ConfigError, MelConfig

BASELINES = ("opus", "griffin-lim")
# bit/s asked of Opus. The lowest is the least that it takes: four times what eight levels of the tokenizer have.
OPUS_BITRATES = (6_000, 12_000, 24_000)
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
_ITERATIONS, _MOMENTUM = 60, 0.99
_NNLS_ITERATIONS = 50


def check_baselines(names: tuple[str, ...]) -> None:
    """Raises ConfigError: a baseline is not known, or its package is not there."""
    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"--baselines: expected some of {', '.join(BASELINES)}, or none, got {name!r}")
    if "opus" in names:
        try:
            import av
        except ImportError:
            raise ConfigError(
                "--baselines: opus needs the package av: pip install 'mimo-jax[eval]', or leave opus out"
            ) from None
        if "libopus" not in av.codecs_available:
            raise ConfigError("--baselines: opus needs a PyAV with libopus, or leave opus out")


def opus(wav_S: np.ndarray, sample_rate: int, bitrate: int) -> tuple[np.ndarray, int]:
    """A clip after Opus (libopus, 20 ms frames, variable bitrate): float32 [S], and the bits of its packets.

    The container's own bytes are not counted; an encoder may need more or less than it was asked for.
    """
    import av

    rate = sample_rate if sample_rate in _OPUS_RATES else 48_000
    wav = resample(wav_S, sample_rate, rate)
    buffer = io.BytesIO()
    bits = 0
    with av.open(buffer, "w", format="ogg") as container:
        # `audio`, the default of opusenc: `voip` filters low frequencies, which shifts phases and spoils SI-SDR.
        stream = container.add_stream("libopus", rate=rate, layout="mono", options={"application": "audio"})
        stream.bit_rate = bitrate
        frame = av.AudioFrame.from_ndarray(np.clip(wav, -1.0, 1.0)[None].astype(np.float32), "flt", "mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            bits += 8 * packet.size
            container.mux(packet)
    buffer.seek(0)
    with av.open(buffer, "r", format="ogg") as source:
        parts = [frame.to_ndarray() for frame in source.decode(audio=0)]
        decoded_rate = source.streams.audio[0].rate
    decoded = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0, np.float32)
    decoded_S = resample(decoded, decoded_rate, sample_rate)[: len(wav_S)]
    return np.pad(decoded_S, (0, len(wav_S) - len(decoded_S))), bits


def griffin_lim(wav_S: np.ndarray, config: MelConfig, seed: int = 0) -> np.ndarray:
    """A clip from its mel spectrogram alone, without any network: the ceiling of what passes through that. float32 [S].

    Non-negative magnitudes that have the same mel spectrogram, then phases that belong together, from random ones.

    Sources: Griffin and Lim 1984, with the momentum of Perraudin et al. 2013; multiplicative updates of Lee and Seung
    2001.
    """
    if config.n_fft != config.win_length:
        raise ConfigError(f"griffin-lim: expected win_length = n_fft, got {config.win_length} and {config.n_fft}")
    size, hop = config.n_fft, config.hop_length
    length = len(wav_S)
    padded = np.pad(np.asarray(wav_S, np.float64), (size // 2, size // 2 + size))
    mel_TC = np.abs(_stft(padded, size, hop)) @ mel_filterbank(config)
    magnitude_TF = _magnitudes(mel_TC, config)
    random = np.random.default_rng(seed)
    phase_TF = np.exp(2j * np.pi * random.random(magnitude_TF.shape))
    before_TF = np.zeros_like(phase_TF)
    for _ in range(_ITERATIONS):
        consistent_TF = _stft(_istft(magnitude_TF * phase_TF, size, hop, len(padded)), size, hop)
        ahead_TF = consistent_TF + _MOMENTUM * (consistent_TF - before_TF)
        phase_TF = ahead_TF / np.maximum(np.abs(ahead_TF), 1e-16)
        before_TF = consistent_TF
    wave = _istft(magnitude_TF * phase_TF, size, hop, len(padded))
    return wave[size // 2 : size // 2 + length].astype(np.float32)


def _magnitudes(mel_TC: np.ndarray, config: MelConfig) -> np.ndarray:
    """Least squares of `magnitude_TF @ filters_FC = mel_TC` with no magnitude negative."""
    filters_FC = mel_filterbank(config)
    start_TF = np.maximum(mel_TC @ _inverse(config), 1e-8)
    wanted_TF, gram_FF = mel_TC @ filters_FC.T, filters_FC @ filters_FC.T
    magnitude_TF = start_TF
    for _ in range(_NNLS_ITERATIONS):
        magnitude_TF = magnitude_TF * wanted_TF / np.maximum(magnitude_TF @ gram_FF, 1e-12)
    return magnitude_TF


@functools.lru_cache(maxsize=2)
def _inverse(config: MelConfig) -> np.ndarray:
    return np.linalg.pinv(mel_filterbank(config))


def _stft(wav_S: np.ndarray, size: int, hop: int) -> np.ndarray:
    frames_TN = np.lib.stride_tricks.sliding_window_view(wav_S, size)[::hop]
    return np.fft.rfft(frames_TN * hann_window(size), axis=1)


def _istft(spectrum_TF: np.ndarray, size: int, hop: int, length: int) -> np.ndarray:
    """The wave whose STFT is nearest: float64 [length]."""
    window = hann_window(size)
    frames_TN = np.fft.irfft(spectrum_TF, n=size, axis=1) * window
    wave, weight = np.zeros(length + size), np.zeros(length + size)
    for t, frame_N in enumerate(frames_TN):
        wave[t * hop : t * hop + size] += frame_N
        weight[t * hop : t * hop + size] += window**2
    return (wave / np.maximum(weight, 1e-8))[:length]
