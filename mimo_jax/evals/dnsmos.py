"""DNSMOS: what listeners would say of a clip, estimated without its source (Reddy et al. 2022, arXiv 2110.01763).

The networks are files in the wheel of `speechmos`, run by `onnxruntime` (extra `dnsmos`). The package itself is not
imported: it needs librosa and an HTTP client.

S samples at 16 kHz.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.config import ConfigError
from mimo_jax.evals.slaney import power_mel

SAMPLE_RATE = 16_000
_WINDOW = int(9.01 * SAMPLE_RATE)  # samples that the networks hear at a time
_FILES = {
    "sig_bak_ovr.onnx": "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd",
    "model_v8.onnx": "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91",
}
# Highest power first: from what the network says to the scale of listeners.
_SCALES = {
    "dnsmos_signal": (-0.08397278, 1.22083953, 0.0052439),
    "dnsmos_background": (-0.13166888, 1.60915514, -0.39604546),
    "dnsmos_overall": (-0.06766283, 1.11546468, 0.04602535),
}


def dnsmos(wav_S: np.ndarray) -> dict[str, float]:
    """Mean opinion scores 1..5 of a clip at 16 kHz: signal, background, overall (P.835) and overall (P.808).

    Clips shorter than 9.01 s are repeated; in longer ones the window moves by whole seconds and scores are averaged.

    Raises:
        ValueError: the clip is empty.
        ConfigError: the packages are not there.

    Source: speechmos 0.0.1.1, `dnsmos.DNSMOS`.
    """
    if not len(wav_S):
        raise ValueError("the clip is empty")
    p835, p808 = _sessions()
    wav_S = np.clip(np.asarray(wav_S, np.float32), -1.0, 1.0)
    while len(wav_S) < _WINDOW:
        wav_S = np.concatenate([wav_S, wav_S])
    scores = []
    # A last window that begins within the first hundredth of its second is not heard, as in the original.
    for second in range(int(len(wav_S) // SAMPLE_RATE - 9.01) + 1):
        window_S = wav_S[second * SAMPLE_RATE :][:_WINDOW]
        raw = p835.run(None, {"input_1": window_S[None]})[0][0]
        values = {name: float(np.polyval(_SCALES[name], x)) for name, x in zip(_SCALES, raw, strict=True)}
        values["dnsmos_p808"] = float(p808.run(None, {"input_1": _log_mel(window_S[:-160])[None]})[0][0][0])
        scores.append(values)
    return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}


def _log_mel(wav_S: np.ndarray) -> np.ndarray:
    """What the P.808 network hears: decibels below the loudest bin, 80 at most, scaled: float32 [T, 120]."""
    power = np.maximum(power_mel(wav_S, SAMPLE_RATE, 321, 160, 120), 1e-10)
    decibels = 10.0 * np.log10(power / power.max())
    return ((np.maximum(decibels, -80.0) + 40.0) / 40.0).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _sessions() -> tuple[Any, Any]:
    spec = importlib.util.find_spec("speechmos")  # found, not imported
    try:
        import onnxruntime
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError("DNSMOS needs the packages speechmos and onnxruntime: pip install 'mimo-jax[dnsmos]'")
    folder = Path(spec.origin).parent / "dnsmos_models"
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1  # files are measured side by side
    sessions = []
    for name, expected in _FILES.items():
        content = (folder / name).read_bytes()
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            raise ConfigError(
                f"{folder / name}: expected the file of speechmos 0.0.1.1, SHA-256 {expected}, got {found}"
            )
        sessions.append(onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"]))
    return sessions[0], sessions[1]
