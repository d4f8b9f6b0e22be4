"""Recorded, transcribed speech from Debian packages, as JSONL manifests.

    sudo apt-get install asterisk-core-sounds-{en,es,fr,it,ru} asterisk-core-sounds-{en,es,fr,it,ru}-g722 festvox-ru
    pip install 'mimo-jax[eval]'                                  # PyAV decodes G.722
    mimo-jax prepare debian --out data/debian

`asterisk-core-sounds-LL` and `-LL-g722`: 2,830 telephone prompts, 131 minutes, one speaker for each language, 16 kHz
(7 kHz wide); en, es, fr CC-BY-SA-3.0, it, ru CC-BY-3.0. `festvox-ru`: 620 read sentences, 99 minutes, one Russian man,
16 kHz; BSD-like. Install them where you train; they are not part of this package.

Left out: prompts whose transcript says anything in brackets (tones, effects, silences, remarks to the reader), prompts
without a sound file, and clips that cannot be decoded; all are counted. One text in twenty is held out, chosen by its
hash, so that prompts of equal wording are on the same side. Speakers can be held out: all they say is then in
`held-out-voices.jsonl` alone.

The phone labels of festvox-ru are written to `phones.jsonl`: lines as those of a manifest, of all its recordings on any
side, whose `segments` are phones (`pau` is silence). A manifest has room for one kind of segments, its words.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_jax.audio.files import AudioError, load_audio
from mimo_jax.corpora.manifest import (
    CorpusError,
    CorpusSummary,
    training_speakers,
    write_clip,
    write_lines,
    write_manifests,
)

ASTERISK_LANGUAGES = ("en", "es", "fr", "it", "ru")
_LANGUAGE_NAMES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}
_PERSONS = {"f": "woman", "m": "man"}
_BRACKETS = re.compile(r"[\[\](){}<>]")
_SAMPLE_RATE = 16_000  # what the recordings have
_VALIDATION_SHARE = 20  # one text in so many
_FESTVOX = "usr/share/festival/voices/russian/msu_ru_nsh_clunits"


@dataclass(frozen=True)
class Recording:
    """A transcribed recording of an installed package."""

    path: Path
    name: str
    text: str
    language: str
    speaker: str
    person: str
    labels: Path | None = None  # phone labels, if there are any


def prepare_debian(
    folder: str | Path,
    *,
    root: str | Path = "/",
    languages: Sequence[str] = ASTERISK_LANGUAGES,
    festvox: bool = True,
    min_characters: int = 1,
    hold_out: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> CorpusSummary:
    """Writes WAV files and manifests of the packages that are installed, and `phones.jsonl` if festvox-ru is.

    Args:
        root: where the packages are installed, or unpacked with `dpkg-deb -x`.
        min_characters: shorter transcripts are left out (many prompts are single words).
        hold_out: speakers that go to `held-out-voices.jsonl`.

    Raises:
        FileNotFoundError: none of the packages is installed (the message says how to install them).
        AudioError: PyAV, which decodes G.722, is not installed.
        CorpusError: a speaker to hold out is not there, or a file of labels is wrong.
    """
    folder, root = Path(folder), Path(root)
    recordings: list[Recording] = []
    skipped: list[str] = []
    for language in languages:
        recordings += asterisk_recordings(root, language, skipped)
    if festvox:
        recordings += festvox_recordings(root, skipped)
    if not recordings:
        packages = " ".join(f"asterisk-core-sounds-{x} asterisk-core-sounds-{x}-g722" for x in languages)
        raise FileNotFoundError(f"{root}: none of the packages is installed: apt-get install {packages} festvox-ru")
    speakers = {r.speaker for r in recordings}
    training_speakers(speakers, hold_out, speakers)
    if any(r.path.suffix == ".g722" for r in recordings):
        _require_av()
    train: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    voices: list[dict[str, Any]] = []
    phones: list[dict[str, Any]] = []
    for i, recording in enumerate(recordings):
        if len(recording.text) < min_characters:
            skipped.append(f"{recording.path}: transcript shorter than {min_characters} characters")
            continue
        try:
            wav = load_audio(recording.path, _SAMPLE_RATE)
        except AudioError as error:
            skipped.append(str(error))
            continue
        clip = write_clip(
            folder,
            f"audio/{recording.language}/{recording.speaker}/{recording.name}.wav",
            wav,
            _SAMPLE_RATE,
            text=recording.text,
            language=recording.language,
            speaker=recording.speaker,
            caption=f"A {recording.person} speaks {_LANGUAGE_NAMES[recording.language[:2]]}.",
        )
        digest = hashlib.sha256(recording.text.encode()).digest()
        held_out = int.from_bytes(digest[:4]) % _VALIDATION_SHARE == 0
        (voices if recording.speaker in hold_out else validation if held_out else train).append(clip)
        if recording.labels is not None:
            phones.append({"audio": clip["audio"], "segments": phone_labels(recording.labels, clip["duration"])})
        if (i + 1) % 500 == 0:
            progress(f"{i + 1} of {len(recordings)} recordings")
    if phones:
        write_lines(folder / "phones.jsonl", phones)
    return write_manifests(folder, train, validation, skipped, voices)


def phone_labels(path: Path, duration: float) -> list[dict[str, Any]]:
    """Phones of a label file of Festival: a header up to a line `#`, then lines `END_SECONDS COLOUR PHONE`.

    Each phone begins where the one before ends. `duration` is the clip's, in seconds; nothing lasts longer.
    """
    phones: list[dict[str, Any]] = []
    start, body = 0.0, False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not body or not line.strip():
            body = body or line.strip() == "#"
            continue
        try:
            end_text, _, phone = line.split()
            end = float(end_text)
        except ValueError:
            raise CorpusError(f"{path}:{number}: expected END_SECONDS COLOUR PHONE, got {line[:60]!r}") from None
        if not start <= end < 1e9:
            raise CorpusError(f"{path}:{number}: expected a time not before {start}, got {end_text}")
        end = min(end, duration)
        if end > start:
            phones.append({"start": round(start, 4), "end": round(end, 4), "text": phone})
            start = end
    return phones


def asterisk_recordings(root: Path, language: str, skipped: list[str]) -> Iterator[Recording]:
    """Prompts of one language, in the order of the transcript; lines that are left out are added to `skipped`.

    The sound folder is named `LL_CC_g_Speaker`, for instance `en_US_f_Allison`.
    """
    package = f"asterisk-core-sounds-{language}"
    transcript = root / "usr/share/doc" / package / f"core-sounds-{language}.txt.gz"
    folders = sorted(p for p in (root / "usr/share/asterisk/sounds").glob(f"{language}_??_?_*") if p.is_dir())
    if not transcript.is_file() or not folders:
        return
    _, country, gender, speaker = folders[0].name.split("_", 3)
    for line in gzip.decompress(transcript.read_bytes()).decode("utf-8-sig").splitlines():
        name, separator, text = line.partition(":")
        name, text = name.strip(), " ".join(text.split())
        if line.startswith(";") or not separator or not text:
            continue
        path = folders[0] / f"{name}.g722"
        if _BRACKETS.search(text):
            skipped.append(f"{path}: the transcript describes or remarks: {text[:60]}")
        elif not path.is_file():
            skipped.append(f"{path}: no such sound file (package {package}-g722)")
        else:
            yield Recording(path, name, text, f"{language}-{country}", speaker.lower(), _PERSONS[gender])


def festvox_recordings(root: Path, skipped: list[str]) -> Iterator[Recording]:
    """Sentences of festvox-ru, `( ru_0001 "text" )` a line; the stress marks (`+` before a vowel) are taken out."""
    folder = root / _FESTVOX
    transcript = folder / "etc" / "txt.done.data"
    if not transcript.is_file():
        return
    for line in transcript.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r'\(\s*(\S+)\s+"(.*)"\s*\)', line.strip())
        if match is None:
            continue
        path = folder / "wav" / f"{match[1]}.wav"
        if path.is_file():
            text = " ".join(match[2].replace("+", "").split())
            labels = folder / "lab" / f"{match[1]}.lab"
            found = labels if labels.is_file() else None
            yield Recording(path, match[1], text, "ru-RU", "festvox-nsh", "man", found)
        else:
            skipped.append(f"{path}: no such sound file (package festvox-ru)")


def _require_av() -> None:
    try:
        import av  # noqa: F401
    except ImportError:
        raise AudioError("the G.722 prompts need PyAV: pip install 'mimo-jax[eval]'") from None
