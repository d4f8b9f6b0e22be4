"""What happened to a clip: measurements of a decoded wave against its source.

S samples, T frames, N samples of a frame, F = N // 2 + 1 bins.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_jax.audio.features import LOG_FLOOR, hann_window
from mimo_jax.audio.files import resample
from mimo_jax.config import ConfigError
from mimo_jax.evals.dnsmos import SAMPLE_RATE as DNSMOS_RATE
from mimo_jax.evals.dnsmos import dnsmos
from mimo_jax.evals.reconstruction import mel_distance
from mimo_jax.evals.speaker import DEFAULT, load_speaker_model, speaker_similarity

# FFT sizes of the STFT distance: those of the multi-scale STFT discriminators (report section 2.1).
STFT_SIZES = (2048, 1024, 512, 256, 128)
# PESQ's C code keeps the delays of 50 utterances and overruns its arrays with more. An utterance and the pause after it
# take 0.4 s, so 20 s are safe; P.862 was validated on 8..30 s.
PESQ_SECONDS = 20.0


class Unmeasurable(ValueError):
    """A clip has no value of a metric; the message says why."""


@dataclass(frozen=True)
class Column:
    """A measured quantity: its name for people, and whether more of it is better."""

    label: str
    more_is_better: bool = True


# Metrics by the name they are asked for, with the quantities that each gives.
METRICS: dict[str, dict[str, Column]] = {
    "mel": {"mel": Column("mel", False)},
    "stft": {
        "stft": Column("STFT", False),
        "stft_convergence": Column("STFT convergence", False),
        "stft_magnitude": Column("STFT log-magnitude", False),
    },
    "si-sdr": {"si_sdr": Column("SI-SDR dB")},
    "pesq": {"pesq_nb": Column("PESQ NB"), "pesq_wb": Column("PESQ WB")},
    "stoi": {"stoi": Column("STOI")},
    "speaker": {"speaker_similarity": Column("speaker similarity")},
    "dnsmos": {
        "dnsmos_overall": Column("DNSMOS overall"),
        "dnsmos_signal": Column("DNSMOS signal"),
        "dnsmos_background": Column("DNSMOS background"),
        "dnsmos_p808": Column("DNSMOS P.808"),
    },
}
DEFAULT_METRICS = ("mel", "stft", "si-sdr", "pesq", "stoi", "speaker")
COLUMNS = {name: column for columns in METRICS.values() for name, column in columns.items()}
# Packages whose version a metric depends on.
_PACKAGES = {"pesq": ("pesq",), "stoi": ("pystoi",), "dnsmos": ("speechmos", "onnxruntime")}


def check_metrics(metrics: Sequence[str], speaker_model: str = DEFAULT) -> dict[str, str]:
    """Sees that metrics can be measured, before work is done; returns the versions of the packages that do it.

    Raises:
        ConfigError: a metric is not known, or its package is not there.
    """
    versions = {"numpy": np.__version__}
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"--metrics: expected some of {', '.join(METRICS)}, got {name!r}")
        for package in _PACKAGES.get(name, ()):
            extra = "dnsmos" if name == "dnsmos" else "eval"
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                wanted = f"--metrics: {name} needs the package {package}"
                raise ConfigError(f"{wanted}: pip install 'mimo-jax[{extra}]', or leave {name} out") from None
    if "speaker" in metrics:
        load_speaker_model(speaker_model)
        if speaker_model == DEFAULT:
            versions["resemblyzer"] = importlib.metadata.version("resemblyzer")
    return versions


class Source:
    """A source clip that reconstructions are measured against; what is computed of it alone is computed once."""

    def __init__(
        self,
        wav_S: np.ndarray,
        sample_rate: int,
        metrics: Iterable[str] = DEFAULT_METRICS,
        speaker_model: str = DEFAULT,
    ) -> None:
        """Takes the clip, float [S], the metrics to measure and the model of `speaker`."""
        self.wav_S, self.sample_rate, self.metrics = np.asarray(wav_S, np.float32), sample_rate, tuple(metrics)
        self._speaker_model = load_speaker_model(speaker_model) if "speaker" in self.metrics else None
        self._memory: dict[Any, np.ndarray] = {}

    def measure(self, decoded_S: np.ndarray) -> tuple[dict[str, float], dict[str, str]]:
        """Measures a reconstruction, float [S'] at the same rate, cut or filled with silence to the source's length.

        Returns:
            The values by the names in `COLUMNS`, and of those that there are none of, the reason.
        """
        decoded_S = np.asarray(decoded_S, np.float32)[: len(self.wav_S)]
        decoded_S = np.pad(decoded_S, (0, len(self.wav_S) - len(decoded_S)))
        values: dict[str, float] = {}
        left_out: dict[str, str] = {}
        for metric in self.metrics:
            try:
                if not (np.isfinite(self.wav_S).all() and np.isfinite(decoded_S).all()):
                    raise Unmeasurable("a sample is not finite")
                found = _MEASURES[metric](self, decoded_S)
                if not np.isfinite(list(found.values())).all():
                    raise Unmeasurable("the value is not finite")
                values |= found
            except Unmeasurable as reason:
                left_out |= dict.fromkeys(METRICS[metric], str(reason))
        return values, left_out

    def _at(self, rate: int) -> np.ndarray:
        if rate not in self._memory:
            self._memory[rate] = resample(self.wav_S, self.sample_rate, rate)
        return self._memory[rate]

    def _pair(self, decoded_S: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.wav_S.any():
            raise Unmeasurable("the source is silent")
        if not decoded_S.any():
            raise Unmeasurable("the reconstruction is silent")
        return self._at(rate), resample(decoded_S, self.sample_rate, rate)

    def _mel(self, decoded_S: np.ndarray) -> dict[str, float]:
        return {"mel": mel_distance(self.wav_S, decoded_S, self.sample_rate)[0]}

    def _stft(self, decoded_S: np.ndarray) -> dict[str, float]:
        convergence, magnitude = stft_distance(self.wav_S, decoded_S)
        return {"stft": convergence + magnitude, "stft_convergence": convergence, "stft_magnitude": magnitude}

    def _si_sdr(self, decoded_S: np.ndarray) -> dict[str, float]:
        return {"si_sdr": si_sdr(self.wav_S, decoded_S)}

    def _pesq(self, decoded_S: np.ndarray) -> dict[str, float]:
        return {
            "pesq_nb": pesq(*self._pair(decoded_S, 8_000), 8_000),
            "pesq_wb": pesq(*self._pair(decoded_S, 16_000), 16_000),
        }

    def _stoi(self, decoded_S: np.ndarray) -> dict[str, float]:
        return {"stoi": stoi(*self._pair(decoded_S, _STOI_RATE))}

    def _speaker(self, decoded_S: np.ndarray) -> dict[str, float]:
        assert self._speaker_model is not None
        self._pair(decoded_S, self.sample_rate)
        if "speaker" not in self._memory:
            self._memory["speaker"] = self._speaker_model(self.wav_S, self.sample_rate)
        try:
            other = self._speaker_model(decoded_S, self.sample_rate)
            return {"speaker_similarity": speaker_similarity(self._memory["speaker"], other)}
        except ValueError as error:
            raise Unmeasurable(str(error)) from None

    def _dnsmos(self, decoded_S: np.ndarray) -> dict[str, float]:
        return dnsmos(self._pair(decoded_S, DNSMOS_RATE)[1])


_MEASURES: dict[str, Callable[[Source, np.ndarray], dict[str, float]]] = {
    "mel": Source._mel,
    "stft": Source._stft,
    "si-sdr": Source._si_sdr,
    "pesq": Source._pesq,
    "stoi": Source._stoi,
    "speaker": Source._speaker,
    "dnsmos": Source._dnsmos,
}


def stft_distance(reference_S: np.ndarray, decoded_S: np.ndarray) -> tuple[float, float]:
    """Multi-resolution STFT distance of waves of one length: its two parts, each a mean over `STFT_SIZES`.

    Hann windows of unit energy, hop N / 4, frames that lie inside the clip (one, filled up, if it is shorter).

    Returns:
        Spectral convergence, | |R| - |D| | / | R | in the Frobenius norm, and the mean absolute difference of the
        natural logs of the magnitudes, floored at `LOG_FLOOR`. The distance is their sum.

    Raises:
        Unmeasurable: the reference is silent.

    Source: Yamamoto et al. 2020 (arXiv 1910.11480), section 2.2, with other FFT sizes.
    """
    parts = []
    for size in STFT_SIZES:
        reference_TF, decoded_TF = (_magnitude(wav, size) for wav in (reference_S, decoded_S))
        norm = np.linalg.norm(reference_TF)
        if norm == 0.0:
            raise Unmeasurable("the source is silent")
        logs = [np.log(np.maximum(x, LOG_FLOOR)) for x in (reference_TF, decoded_TF)]
        parts.append((np.linalg.norm(reference_TF - decoded_TF) / norm, np.abs(logs[0] - logs[1]).mean()))
    convergence, magnitude = np.mean(parts, axis=0)
    return float(convergence), float(magnitude)


def _magnitude(wav_S: np.ndarray, size: int) -> np.ndarray:
    wav_S = np.pad(np.asarray(wav_S, np.float64), (0, max(0, size - len(wav_S))))
    frames_TN = np.lib.stride_tricks.sliding_window_view(wav_S, size)[:: size // 4]
    window = hann_window(size)
    return np.abs(np.fft.rfft(frames_TN * (window / np.sqrt(np.sum(window**2))), axis=1))


def si_sdr(reference_S: np.ndarray, decoded_S: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of waves of one length, in dB; means are not removed.

    Raises:
        Unmeasurable: it would be infinite: a wave is silent, orthogonal to the other, or a multiple of it.

    Source: Le Roux et al. 2019 (arXiv 1811.02508), equation 5.
    """
    reference_S, decoded_S = (np.asarray(wav, np.float64) for wav in (reference_S, decoded_S))
    energy = float(reference_S @ reference_S)
    if energy == 0.0:
        raise Unmeasurable("the source is silent")
    target_S = (decoded_S @ reference_S) / energy * reference_S
    signal, noise = (float(x @ x) for x in (target_S, decoded_S - target_S))
    if signal == 0.0:
        raise Unmeasurable("the reconstruction has nothing of the source")
    if noise <= 1e-24 * signal:
        raise Unmeasurable("the reconstruction is the source")
    return float(10.0 * np.log10(signal / noise))


def pesq(reference_S: np.ndarray, decoded_S: np.ndarray, sample_rate: int) -> float:
    """PESQ of waves of one length, MOS-LQO: narrow band (P.862.1) at 8 kHz, wide band (P.862.2) at 16 kHz.

    Longer clips than `PESQ_SECONDS` are cut into equal pieces of at most so much, whose values are averaged; pieces
    without speech are not counted.

    Raises:
        Unmeasurable: the clip is too short, or there is no speech in it.
    """
    library: Any = importlib.import_module("pesq")
    mode = "wb" if sample_rate == 16_000 else "nb"
    values, reason = [], ""
    for reference, decoded in _pieces(reference_S, decoded_S, int(PESQ_SECONDS * sample_rate)):
        if not decoded.any() or not reference.any():
            reason = "PESQ: silence"
            continue
        try:
            values.append(float(library.pesq(sample_rate, reference, decoded, mode)))
        except (library.PesqError, ValueError) as error:  # ValueError: what is left after filtering is silence
            text = error.args[0] if error.args else type(error).__name__
            reason = f"PESQ: {text.decode() if isinstance(text, bytes) else text}"
    if not values or not np.isfinite(values).all():
        raise Unmeasurable(reason or "PESQ: no value")
    return float(np.mean(values))


def _pieces(one_S: np.ndarray, other_S: np.ndarray, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    count = max(1, -(-len(one_S) // longest))
    yield from zip(np.array_split(one_S, count), np.array_split(other_S, count), strict=True)


_STOI_RATE = 10_000  # what it works at


def stoi(reference_S: np.ndarray, decoded_S: np.ndarray) -> float:
    """Short-time objective intelligibility of waves of one length at 10 kHz; classic, not extended.

    Raises:
        Unmeasurable: less than 30 frames (0.4 s) are left without the silent ones.

    Source: Taal et al. 2011; the package pystoi.
    """
    library: Any = importlib.import_module("pystoi")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = float(library.stoi(reference_S, decoded_S, _STOI_RATE, extended=False))
        except (ValueError, IndexError):  # not one frame
            raise Unmeasurable("STOI: too short") from None
    if any("Not enough STFT frames" in str(warning.message) for warning in caught):
        raise Unmeasurable("STOI: less than 0.4 s of speech")
    if not np.isfinite(value):
        raise Unmeasurable("STOI: no value")
    return value
