"""The quickstart's corpus: sentences spoken by espeak-ng in several voices, recorded speech, and text.

The folder it writes holds `audio/*.wav`, `train.jsonl`, `validation.jsonl` (held-out sentences, the same voices) and
the text corpora `train.txt`, `validation.txt` (one text a line). The same arguments give the same files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import AudioError, load_audio, resample
from mimo_jax.audio.synth import VOICES, Synthesizer, Utterance
from mimo_jax.corpora.manifest import CorpusSummary, write_clip, write_manifests
from mimo_jax.corpora.sentences import sentences as own_sentences
from mimo_jax.corpora.sentences import texts as own_texts
from mimo_jax.data.manifest import Manifest

QUICKSTART_VOICES = ("default", "reed", "m3", "f2", "f4", "f5")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".m4a", ".g722")

_RATES = {"slowly": 130, "": 165, "quickly": 210}  # words per minute
_PITCHES = {"low": 25, "": 50, "high": 80}
_PAIR_SHARE = 0.25  # clips that hold two sentences, so that interleaved documents have places to cut


def caption(person: str, pace: str, pitch: str) -> str:
    """What is heard: person "man" or "woman", pace "slowly", "" or "quickly", pitch "low", "" or "high".

    >>> caption("man", "slowly", "low")
    'A man speaks slowly in a low voice.'
    """
    return f"A {person} speaks{' ' + pace if pace else ''}{f' in a {pitch} voice' if pitch else ''}."


def instruction(pace: str, pitch: str) -> str:
    """The instruction that asks for this style.

    >>> instruction("slowly", "low")
    'Speak slowly in a low voice.'
    """
    if not pace and not pitch:
        return "Speak in your normal voice."
    return f"Speak{' ' + pace if pace else ''}{f' in a {pitch} voice' if pitch else ''}."


def build_corpus(
    folder: str | Path,
    *,
    sentences: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    voices: Sequence[str] = QUICKSTART_VOICES,
    minutes: float = 18.0,
    validation_sentences: int = 40,
    seed: int = 0,
    recorded: Iterable[str | Path] = (),
    audio: Iterable[str | Path] = (),
    sample_rate: int = 24_000,
    progress: Callable[[str], None] = lambda line: None,
) -> CorpusSummary:
    """Builds the corpus.

    Args:
        folder: where it is written.
        sentences: what to speak; the package's own by default.
        texts: text-only documents; the package's own by default.
        voices: keys of `mimo_jax.audio.synth.VOICES`; each held-out sentence gets one of them in turn.
        minutes: synthetic speech to make for training. Every sentence is spoken once before any is spoken again.
        validation_sentences: sentences that are held out, in speech and in text.
        seed: of the split, the styles and the order.
        recorded: manifests of recorded speech to include (missing ones are skipped); every fifth clip is held out.
        audio: folders with recordings of the user, any format that is read; the transcript of `x.wav` is `x.txt` beside
            it, if there is one. Every tenth recording is held out.
        sample_rate: Hz of the WAV files.
        progress: takes a line now and then.

    Raises:
        SynthError: speech cannot be synthesised.
        AudioError: a folder of `audio` is missing or holds no recording.
        ValueError: fewer sentences than are to be held out.
    """
    folder = Path(folder)
    spoken = list(own_sentences() if sentences is None else sentences)
    if not 0 < validation_sentences < len(spoken):
        raise ValueError(f"validation_sentences: expected 1..{len(spoken) - 1}, got {validation_sentences}")
    random.Random(f"split {seed}").shuffle(spoken)
    held_out, learnt = spoken[:validation_sentences], spoken[validation_sentences:]

    train = _speak(folder, "t", learnt, voices, minutes * 60.0, seed, sample_rate, progress)
    validation = _speak(folder, "v", held_out, voices, None, seed, sample_rate, progress)
    skipped: list[str] = []
    for kind, lines, every in (
        ("recorded", _recordings_of_manifests(recorded), 5),
        ("user", _recordings_of_folders(audio), 10),
    ):
        done = 0
        for path, fields in lines:
            try:
                wav = load_audio(path, sample_rate)
            except AudioError as error:
                skipped.append(str(error))
                continue
            clip = write_clip(folder, f"audio/{kind}-{done:05d}.wav", wav, sample_rate, **fields)
            done += 1
            (validation if done % every == 0 else train).append(clip)
        if done:
            progress(f"{done} recordings ({kind})")

    documents = list(own_texts() if texts is None else texts)
    random.Random(f"texts {seed}").shuffle(documents)
    split = len(documents) // 10
    _write_lines(folder / "validation.txt", [*documents[:split], *held_out])
    _write_lines(folder / "train.txt", [*documents[split:], *learnt])
    return write_manifests(folder, train, validation, skipped)


def _speak(
    folder: Path,
    prefix: str,
    sentences: Sequence[str],
    voices: Sequence[str],
    seconds: float | None,
    seed: int,
    sample_rate: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Speaks all sentences once (`seconds` None), or goes on through them until there is as much speech."""
    draw = random.Random(f"{prefix} {seed}")
    clips: list[dict[str, Any]] = []
    total, spoken = 0.0, 0
    with Synthesizer() as synthesizer:
        while total < seconds if seconds is not None else spoken < len(sentences):
            turn, position = divmod(spoken, len(sentences))
            chosen = sentences[position : position + (2 if draw.random() < _PAIR_SHARE else 1)]
            spoken += len(chosen)
            pace = draw.choice(["", "", "slowly", "quickly"])
            pitch = draw.choice(["", "", "low", "high"])
            voice = voices[(len(clips) + turn) % len(voices)]
            speech = synthesizer.speak(
                Utterance(" ".join(chosen), voice, _RATES[pace], _PITCHES[pitch], seed=len(clips))
            )
            clip = write_clip(
                folder,
                f"audio/{prefix}{len(clips):05d}-{voice}.wav",
                resample(speech.wav, speech.sample_rate, sample_rate),
                sample_rate,
                text=" ".join(chosen),
                language=VOICES[voice].language,
                speaker=f"espeak-{voice}",
                caption=caption(VOICES[voice].person, pace, pitch),
                instruction=instruction(pace, pitch),
                segments=[{"start": round(w.start, 4), "end": round(w.end, 4), "text": w.text} for w in speech.words],
            )
            clips.append(clip)
            total += clip["duration"]
            if len(clips) % 100 == 0:
                progress(f"{len(clips)} clips, {total / 60:.1f} minutes")
    return clips


def _recordings_of_manifests(manifests: Iterable[str | Path]) -> Iterable[tuple[Path, dict[str, Any]]]:
    for path in manifests:
        if not Path(path).is_file():
            continue
        for entry in Manifest(path):
            fields: dict[str, Any] = {
                name: getattr(entry, name) for name in ("text", "language", "speaker", "caption", "instruction")
            }
            fields["segments"] = [{"start": s.start, "end": s.end, "text": s.text} for s in entry.segments]
            yield entry.audio, fields


def _recordings_of_folders(folders: Iterable[str | Path]) -> Iterable[tuple[Path, dict[str, Any]]]:
    for name in folders:
        folder = Path(name)
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
        if not found:
            raise AudioError(f"{folder}: expected a folder with recordings ({', '.join(AUDIO_SUFFIXES)})")
        for path in found:
            transcript = path.with_suffix(".txt")
            text = (
                " ".join(transcript.read_text(encoding="utf-8", errors="replace").split())
                if transcript.is_file()
                else ""
            )
            yield path, {"text": text}


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    atomic_write(path, "".join(line + "\n" for line in lines).encode())
