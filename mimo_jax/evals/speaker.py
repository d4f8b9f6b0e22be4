"""Speaker embeddings: vectors that are near to each other for one voice and far for two.

The default is the GE2E encoder in the wheel of `resemblyzer`, computed here in NumPy. Of that package only the file of
weights is used: nothing of it is imported (it needs torch) and nothing is unpickled. The file must be the known one,
so its arrays are where they are known to be.

S samples, T frames of a partial utterance, P partial utterances, D = 256 wide.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mimo_jax.audio.files import resample
from mimo_jax.config import ConfigError
from mimo_jax.evals.slaney import power_mel

DEFAULT = "resemblyzer"
SpeakerModel = Callable[[np.ndarray, int], np.ndarray]  # (wave float32 [S], sample rate) -> embedding [D]

_RATE, _N_FFT, _HOP, _MELS = 16_000, 400, 160, 40
_PARTIAL = 160  # frames, 1.6 s
_STEP = 77  # frames between partial utterances: 1.3 a second
_LEAST_COVERAGE = 0.75
_LEAST_DBFS = -30.0

_SHA256 = "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"
_WIDTH, _LAYERS = 256, 3
# Byte offsets of float32 little-endian arrays in the file (torch's format before 1.6: storages one after the other,
# each behind its length). All arrays of the LSTM are in one: per layer input and recurrent matrix, then the biases.
_LSTM_AT, _LINEAR_AT, _BIAS_AT = 269_883, 7_731, 6_699


def load_speaker_model(name: str) -> SpeakerModel:
    """A speaker model by name: `resemblyzer`, or `module:function` of your own, as `SpeakerModel`.

    Raises:
        ConfigError: it is not there, or the file of weights is another.
    """
    if name == DEFAULT:
        _weights()
        return resemblyzer_embedding
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"--speaker-model: expected {DEFAULT} or MODULE:FUNCTION, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--speaker-model={name}: {error}") from None
    if not callable(found):
        raise ConfigError(f"--speaker-model={name}: expected a function, got {type(found).__name__}")
    return found


def speaker_similarity(one_D: np.ndarray, other_D: np.ndarray) -> float:
    """Cosine of two embeddings. Raises ValueError: one is zero, or not finite."""
    norm = float(np.linalg.norm(one_D) * np.linalg.norm(other_D))
    if not 0 < norm < np.inf:
        raise ValueError("the speaker embedding is zero or not finite")
    return float(np.dot(one_D, other_D)) / norm


def resemblyzer_embedding(wav_S: np.ndarray, sample_rate: int) -> np.ndarray:
    """GE2E embedding: float32 [256], of length 1 (or 0 where nothing is heard), not negative.

    The wave is raised to -30 dBFS if it is quieter. Unlike `resemblyzer.preprocess_wav` nothing is cut out of it: a
    clip and its reconstruction are silent in the same places, and the voice detector is another package of C code.

    Source: Wan et al. 2018 (arXiv 1710.10467); resemblyzer 0.1.4, `VoiceEncoder.embed_utterance`.
    """
    wav_S = np.asarray(resample(wav_S, sample_rate, _RATE), np.float64)
    rms = float(np.sqrt(np.mean(wav_S**2))) if len(wav_S) else 0.0
    if rms == 0.0:
        return np.zeros(_WIDTH, np.float32)
    wav_S = wav_S * max(1.0, 10.0 ** (_LEAST_DBFS / 20.0) / rms)
    frames = -(-(len(wav_S) + 1) // _HOP)
    starts = list(range(0, max(1, frames - _PARTIAL + _STEP + 1), _STEP))
    if len(starts) > 1 and len(wav_S) - starts[-1] * _HOP < _LEAST_COVERAGE * _PARTIAL * _HOP:
        starts.pop()
    wav_S = np.pad(wav_S, (0, max(0, (starts[-1] + _PARTIAL) * _HOP - len(wav_S))))
    mel = power_mel(wav_S, _RATE, _N_FFT, _HOP, _MELS).astype(np.float32)
    embedding_D = _encode(np.stack([mel[start : start + _PARTIAL] for start in starts])).mean(axis=0)
    return embedding_D / max(float(np.linalg.norm(embedding_D)), 1e-12)


def _encode(x_PTC: np.ndarray) -> np.ndarray:
    """Partial utterances through the LSTM layers (gates in torch's order: in, forget, cell, out): float32 [P, D]."""
    layers, linear_DD, bias_D = _weights()
    for input_CG, recurrent_DG, bias_G in layers:
        gates_PTG = x_PTC @ input_CG + bias_G
        hidden = np.zeros((len(x_PTC), _WIDTH), np.float32)
        cell, outputs = hidden, []
        for t in range(x_PTC.shape[1]):
            enter, forget, new, leave = np.split(gates_PTG[:, t] + hidden @ recurrent_DG, 4, axis=1)
            cell = _sigmoid(forget) * cell + _sigmoid(enter) * np.tanh(new)
            hidden = _sigmoid(leave) * np.tanh(cell)
            outputs.append(hidden)
        x_PTC = np.stack(outputs, axis=1)
    out_PD = np.maximum(x_PTC[:, -1] @ linear_DD + bias_D, 0.0)
    return out_PD / np.maximum(np.linalg.norm(out_PD, axis=1, keepdims=True), 1e-12)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


@functools.lru_cache(maxsize=1)
def _weights() -> tuple[list[tuple[np.ndarray, np.ndarray, np.ndarray]], np.ndarray, np.ndarray]:
    """(Input matrix [C, 4 D], recurrent matrix [D, 4 D], bias [4 D]) of each layer; matrix and bias of the output."""
    spec = importlib.util.find_spec("resemblyzer")  # found, not imported
    if spec is None or spec.origin is None:
        raise ConfigError(
            "speaker similarity needs the weights in the package resemblyzer: "
            "pip install --no-deps resemblyzer==0.1.4 (else it brings torch), or leave speaker out of --metrics"
        )
    path = Path(spec.origin).with_name("pretrained.pt")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise ConfigError(f"{path}: expected the file of resemblyzer 0.1.4, SHA-256 {_SHA256}, got {found}")

    position = _LSTM_AT

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        count = int(np.prod(shape))
        array = np.frombuffer(content, "<f4", count, position).reshape(shape)
        position += 4 * count
        return array

    gates = 4 * _WIDTH
    matrices = [(take(gates, width).T, take(gates, _WIDTH).T) for width in (_MELS, *[_WIDTH] * (_LAYERS - 1))]
    layers = [(matrix, recurrent, take(gates) + take(gates)) for matrix, recurrent in matrices]
    position = _LINEAR_AT
    linear_DD = take(_WIDTH, _WIDTH).T
    position = _BIAS_AT
    return layers, linear_DD, take(_WIDTH)
