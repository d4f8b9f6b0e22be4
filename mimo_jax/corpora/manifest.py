"""Writing a corpus: one clip at a time to WAV files, then its JSONL manifests (`mimo_jax.data.manifest` reads them)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import save_wav

_TARGET_RMS = 10 ** (-23 / 20)  # loudness that all clips get, so that no source is heard by its level alone
_PEAK = 0.95


@dataclasses.dataclass(frozen=True)
class CorpusSummary:
    """What was written."""

    folder: Path
    train: Path  # manifest of the training clips
    validation: Path  # and of the held-out ones
    clips: tuple[int, int]  # training and held out
    seconds: tuple[float, float]
    skipped: tuple[str, ...]  # one line for each recording that was left out, with the reason


def write_clip(folder: Path, name: str, wav: np.ndarray, sample_rate: int, **fields: Any) -> dict[str, Any]:
    """Writes clip float32 [S] to the WAV file `name` of the folder; returns its manifest line, without empty fields."""
    save_wav(folder / name, equal_loudness(wav), sample_rate)
    line = {"audio": name, "duration": round(len(wav) / sample_rate, 4)}
    return line | {key: value for key, value in fields.items() if value}


def equal_loudness(wav: np.ndarray) -> np.ndarray:
    """Scales a wave to an RMS of -23 dBFS, less where its peak would pass 0.95; silence stays as it is."""
    rms, peak = float(np.sqrt(np.mean(np.square(wav)))), float(np.abs(wav).max())
    if peak == 0.0:
        return wav
    return np.asarray(wav * min(_TARGET_RMS / rms, _PEAK / peak), np.float32)


def write_manifests(
    folder: Path,
    train: Iterable[Mapping[str, Any]],
    validation: Iterable[Mapping[str, Any]],
    skipped: Iterable[str] = (),
) -> CorpusSummary:
    """Writes `train.jsonl` and `validation.jsonl`."""
    sides = {"train": list(train), "validation": list(validation)}
    for side, lines in sides.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write(folder / f"{side}.jsonl", text.encode())
    return CorpusSummary(
        folder=folder,
        train=folder / "train.jsonl",
        validation=folder / "validation.jsonl",
        clips=(len(sides["train"]), len(sides["validation"])),
        seconds=(_seconds(sides["train"]), _seconds(sides["validation"])),
        skipped=tuple(skipped),
    )


def _seconds(lines: Iterable[Mapping[str, Any]]) -> float:
    return float(sum(line["duration"] for line in lines))
