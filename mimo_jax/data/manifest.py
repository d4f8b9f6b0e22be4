"""JSONL manifests of audio: one JSON object a line, everything but `audio` optional.

    {"audio": "clips/0001.flac", "text": "Good morning.", "language": "en", "speaker": "anna", "caption": "...",
     "instruction": "cheerful, fast", "segments": [{"start": 0.1, "end": 0.5, "text": "Good"}, ...],
     "id": "...", "duration": 1.2}

Relative audio paths start at the manifest's folder. A manifest is checked whole when it is opened, so that a bad line
is found before any work is done; lines are parsed again when they are read, so memory stays at 16 bytes a line.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.data.records import DataError, Segment

_STRINGS = ("audio", "id", "text", "language", "speaker", "caption", "instruction")
FIELDS = (*_STRINGS, "segments", "duration")


class ManifestError(DataError):
    """A manifest is missing or one of its lines is wrong. The message names file, line and field."""


@dataclass(frozen=True)
class ManifestEntry:
    """One line: `audio` is resolved, absent strings are empty, an absent duration is 0 (seconds).

    `id` is the line's own, or else the audio path as the manifest writes it.
    """

    audio: Path
    id: str
    text: str = ""
    language: str = ""
    speaker: str = ""
    caption: str = ""
    instruction: str = ""
    segments: tuple[Segment, ...] = ()
    duration: float = 0.0


class Manifest:
    """A checked JSONL manifest: `len(manifest)`, `manifest[i]`, iteration. Blank lines are skipped.

    `sha256` is the checksum of the file; `unused_fields` are keys that occur in it and mean nothing here, for a notice
    to the user.

    Raises:
        ManifestError: the file is missing, empty, or a line is wrong (the first such line is named).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._folder = self.path.absolute().parent
        digest, position = hashlib.sha256(), 0
        places = array("q")
        unused: set[str] = set()
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip():
                        values = parse_line(self.path, number, line)
                        self._entry(values, number)
                        unused.update(k for k in values if k not in FIELDS)
                        places.extend((position, number))
                    position += len(line)
        except OSError as error:
            raise ManifestError(f"{self.path}: cannot read the manifest ({error.strerror})") from None
        if not places:
            raise ManifestError(f"{self.path}: expected at least one line, the manifest is empty")
        self._places = np.asarray(places).reshape(-1, 2)  # offset and number of each line
        self.sha256, self.unused_fields = digest.hexdigest(), sorted(unused)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> ManifestEntry:
        return next(self.read(index, index + 1))

    def __iter__(self) -> Iterator[ManifestEntry]:
        return self.read(0, len(self))

    def read(self, start: int, stop: int) -> Iterator[ManifestEntry]:
        """Yields entries start..stop."""
        if not 0 <= start < len(self):
            raise IndexError(f"{self.path}: entry {start} of {len(self)}")
        with open(self.path, "rb") as file:
            for offset, number in self._places[start:stop]:
                file.seek(offset)
                yield self._entry(parse_line(self.path, number, file.readline()), number)

    def _entry(self, values: Mapping[str, Any], number: int) -> ManifestEntry:
        def fail(name: str, expected: str, got: object) -> ManifestError:
            return ManifestError(f"{self.path}:{number}: {name}: expected {expected}, got {got!r}")

        texts: dict[str, str] = {}
        for name in _STRINGS:
            value = values.get(name)
            if value is not None and not isinstance(value, str):
                raise fail(name, "a string", value)
            texts[name] = (value or "").strip()
            if not is_text(texts[name]):
                raise fail(name, "text without lone surrogates", value)
        if not texts["audio"] or "\0" in texts["audio"]:
            raise fail("audio", "the path of an audio file", values.get("audio"))
        duration = values.get("duration") or 0.0
        if not _is_time(duration):
            raise fail("duration", "seconds, a non-negative number", duration)
        given = values.get("segments") or []
        if not isinstance(given, list):
            raise fail("segments", "a list of {start, end, text}", given)
        segments: list[Segment] = []
        for i, item in enumerate(given):
            name = f"segments[{i}]"
            if not isinstance(item, dict):
                raise fail(name, "{start, end, text}", item)
            start, end, text = item.get("start"), item.get("end"), item.get("text")
            if start is None or not _is_time(start) or (segments and start < segments[-1].start):
                raise fail(f"{name}.start", "seconds, not before the segment before", start)
            if end is None or not _is_time(end) or end < start:
                raise fail(f"{name}.end", "seconds, not before start", end)
            if not isinstance(text, str) or not is_text(text):
                raise fail(f"{name}.text", "a string", text)
            segments.append(Segment(float(start), float(end), text.strip()))
        audio = texts.pop("audio")
        texts["id"] = texts["id"] or audio
        return ManifestEntry(audio=self._folder / audio, segments=tuple(segments), duration=float(duration), **texts)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def parse_line(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    """The JSON object of a line, or ManifestError."""
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, a number of too many digits
        raise ManifestError(f"{path}:{number}: expected one JSON object in UTF-8 ({error})") from None
    if not isinstance(values, dict):
        raise ManifestError(f"{path}:{number}: expected a JSON object, got {type(values).__name__}")
    return values


def is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write and no tokenizer or file can hold
        return False
    return True
