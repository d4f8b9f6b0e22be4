"""Writing a corpus: one clip at a time to WAV files, then its JSONL manifests (`mimo_jax.data.manifest` reads them).

`train.jsonl` and `validation.jsonl` share their speakers; where speakers are held out, everything they say is in
`held-out-voices.jsonl` and nowhere else, so that a measurement on it is one on unknown voices.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import save_wav
from mimo_jax.data.manifest import Manifest, parse_line

_TARGET_RMS = 10 ** (-23 / 20)  # loudness that all clips get, so that no source is heard by its level alone
_PEAK = 0.95
HELD_OUT_VOICES = "held-out-voices.jsonl"


class CorpusError(ValueError):
    """A corpus cannot be made as asked. The message says what was expected."""


@dataclasses.dataclass(frozen=True)
class CorpusSummary:
    """What was written."""

    folder: Path
    train: Path  # manifest of the training clips
    validation: Path  # and of the held-out ones
    clips: tuple[int, ...]  # training, held out and, where there are such, of held-out voices
    seconds: tuple[float, ...]  # the same
    skipped: tuple[str, ...]  # one line for each recording that was left out, with the reason
    voices: Path | None = None  # manifest of the held-out voices, where there are such

    @property
    def manifests(self) -> tuple[Path, ...]:
        """The files, in the order of `clips`."""
        return (self.train, self.validation, *([self.voices] if self.voices else []))


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
    voices: Iterable[Mapping[str, Any]] = (),
) -> CorpusSummary:
    """Writes `train.jsonl`, `validation.jsonl` and, if there are lines of them, `held-out-voices.jsonl`.

    Without such lines a `held-out-voices.jsonl` of an earlier call is removed: its clips are training data now.
    """
    sides = {"train.jsonl": list(train), "validation.jsonl": list(validation), HELD_OUT_VOICES: list(voices)}
    if not sides[HELD_OUT_VOICES]:
        del sides[HELD_OUT_VOICES]
        (folder / HELD_OUT_VOICES).unlink(missing_ok=True)
    for name, lines in sides.items():
        write_lines(folder / name, lines)
    return CorpusSummary(
        folder=folder,
        train=folder / "train.jsonl",
        validation=folder / "validation.jsonl",
        clips=tuple(len(lines) for lines in sides.values()),
        seconds=tuple(_seconds(lines) for lines in sides.values()),
        skipped=tuple(skipped),
        voices=folder / HELD_OUT_VOICES if HELD_OUT_VOICES in sides else None,
    )


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a manifest, one JSON object a line."""
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def training_speakers(speakers: Iterable[str], hold_out: Iterable[str], known: Iterable[str]) -> list[str]:
    """The speakers that are not held out, in order, each once.

    Raises:
        CorpusError: one of either is not among the known speakers, or none is left.
    """
    there, speakers, hold_out = sorted(set(known)), list(dict.fromkeys(speakers)), set(hold_out)
    for name in (*speakers, *sorted(hold_out)):
        if name not in there:
            raise CorpusError(f"speaker {name}: expected one of {', '.join(there)}")
    left = [name for name in speakers if name not in hold_out]
    if not left:
        raise CorpusError(f"held-out speakers: expected one of {', '.join(speakers)} to be left to train on")
    return left


def join_manifests(sources: Sequence[str | Path], out: str | Path) -> tuple[int, float]:
    """Writes one manifest of the lines of several, in order; relative audio paths then start at the new file's folder.

    All keys of a line are kept, also those that `mimo_jax.data.manifest` does not know.

    Returns:
        Clips, and seconds of those that say their duration.

    Raises:
        ManifestError: a source is missing or wrong.
        CorpusError: the new file is one of the sources, or a recording occurs twice.
    """
    out = Path(out)
    folder = out.absolute().parent
    lines: list[dict[str, Any]] = []
    origin: dict[str, Path] = {}
    for path in map(Path, sources):
        if path.resolve() == out.resolve():
            raise CorpusError(f"{out}: expected a new file, got one of those to join")
        Manifest(path)  # checks it
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            values = dict(parse_line(path, number, line))
            audio = os.path.normpath(path.absolute().parent / values["audio"].strip())
            if audio in origin:
                raise CorpusError(f"{path}:{number}: {audio} is in {origin[audio]} already")
            origin[audio] = path
            values["audio"] = audio if os.path.isabs(values["audio"].strip()) else os.path.relpath(audio, folder)
            lines.append(values)
    write_lines(out, lines)
    return len(lines), float(sum(line.get("duration") or 0.0 for line in lines))


def _seconds(lines: Iterable[Mapping[str, Any]]) -> float:
    return float(sum(line["duration"] for line in lines))
