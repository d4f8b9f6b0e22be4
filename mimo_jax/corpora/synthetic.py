"""The quickstart's corpus: sentences spoken by espeak-ng in several voices, recorded speech, and text.

The folder it writes holds `audio/*.wav`, `train.jsonl`, `validation.jsonl` (held-out sentences, the same voices), the
text corpora `train.txt`, `validation.txt` (one text a line) and, if voices are held out, `held-out-voices.jsonl` (the
held-out sentences by each of these voices). The same arguments give the same files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import AudioError, load_audio, resample
from mimo_jax.audio.synth import VOICES, Synthesizer, Utterance
from mimo_jax.corpora.manifest import CorpusSummary, training_speakers, write_clip, write_manifests
from mimo_jax.data.manifest import Manifest

QUICKSTART_VOICES = ("default", "reed", "m3", "f2", "f4", "f5")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".m4a", ".g722")

SAMPLE_RATE = 24_000  # Hz of the WAV files
_RATES = {"slowly": 130, "": 165, "quickly": 210}  # words per minute
_PITCHES = {"low": 25, "": 50, "high": 80}
_PAIR_SHARE = 0.25  # clips that hold two sentences, so that interleaved documents have places to cut


def caption(person: str, pace: str, pitch: str) -> str:
    """What is heard: person "man" or "woman", pace "slowly", "" or "quickly", pitch "low", "" or "high".

    >>> caption("man", "slowly", "low")
    'A man speaks slowly in a low voice.'
    """
    return f"A {person} speaks{_style(pace, pitch)}."


def instruction(pace: str, pitch: str) -> str:
    """The instruction that asks for this style.

    >>> instruction("slowly", "low")
    'Speak slowly in a low voice.'
    """
    return f"Speak{_style(pace, pitch) or ' in your normal voice'}."


def _style(pace: str, pitch: str) -> str:
    return f"{' ' + pace if pace else ''}{f' in a {pitch} voice' if pitch else ''}"


def shipped_lines(name: str) -> list[str]:
    """The lines of one of the English files that were written for this package.

    `sentences.txt` has one sentence of 8 to 16 words a line, for speech; `texts.txt` one text of two to four sentences
    a line, for text-only training. No sentence occurs in both.
    """
    content = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return [line for line in content.splitlines() if line]


def build_corpus(
    folder: str | Path,
    *,
    sentences: Sequence[str] | None = None,
    minutes: float = 18.0,
    validation_sentences: int = 40,
    recorded: Iterable[str | Path] = (),
    audio: Iterable[str | Path] = (),
    voices: Sequence[str] = QUICKSTART_VOICES,
    hold_out: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> CorpusSummary:
    """Builds the corpus.

    Args:
        sentences: what to speak; the package's own by default.
        minutes: synthetic speech to make for training. Every sentence is spoken once before any is spoken again.
        recorded: manifests of recorded speech to include (missing ones are skipped); every fifth clip is held out.
        audio: folders with recordings of the user, any format that is read; the transcript of `x.wav` is `x.txt` beside
            it, if there is one. Every tenth recording is held out.
        voices: keys of `VOICES` that speak.
        hold_out: those among all `VOICES` that speak only the held-out sentences, in a manifest of their own.

    Raises:
        CorpusError: a voice does not exist, or none is left.
        SynthError: speech cannot be synthesised.
        AudioError: a folder of `audio` is missing or holds no recording.
        ValueError: fewer sentences than are to be held out.
    """
    folder = Path(folder)
    spoken = list(shipped_lines("sentences.txt") if sentences is None else sentences)
    if not 0 < validation_sentences < len(spoken):
        raise ValueError(f"validation_sentences: expected 1..{len(spoken) - 1}, got {validation_sentences}")
    learnt_voices = training_speakers(voices, hold_out, VOICES)
    random.Random("split 0").shuffle(spoken)
    held_out, learnt = spoken[:validation_sentences], spoken[validation_sentences:]

    train = _speak(folder, "t", learnt, learnt_voices, minutes * 60.0, progress)
    validation = _speak(folder, "v", held_out, learnt_voices, None, progress)
    unknown = [
        clip for v in dict.fromkeys(hold_out) for clip in _speak(folder, f"h-{v}-", held_out, [v], None, progress)
    ]
    skipped: list[str] = []
    for kind, lines, every in (
        ("recorded", _recordings_of_manifests(recorded), 5),
        ("user", _recordings_of_folders(audio), 10),
    ):
        done = 0
        for path, fields in lines:
            try:
                wav = load_audio(path, SAMPLE_RATE)
            except AudioError as error:
                skipped.append(str(error))
                continue
            clip = write_clip(folder, f"audio/{kind}-{done:05d}.wav", wav, SAMPLE_RATE, **fields)
            done += 1
            (validation if done % every == 0 else train).append(clip)
        if done:
            progress(f"{done} recordings ({kind})")

    documents = shipped_lines("texts.txt")
    random.Random("texts 0").shuffle(documents)
    split = len(documents) // 10
    _write_lines(folder / "validation.txt", [*documents[:split], *held_out])
    _write_lines(folder / "train.txt", [*documents[split:], *learnt])
    return write_manifests(folder, train, validation, skipped, unknown)


def _speak(
    folder: Path,
    prefix: str,
    sentences: Sequence[str],
    voices: Sequence[str],
    seconds: float | None,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Speaks all sentences once (`seconds` None), or goes on through them until there is as much speech."""
    draw = random.Random(f"{prefix} 0")
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
            said = " ".join(chosen)
            clip = speak_clip(
                synthesizer,
                Utterance(said, voice, _RATES[pace], _PITCHES[pitch], seed=len(clips)),
                folder,
                f"audio/{prefix}{len(clips):05d}-{voice}.wav",
                caption=caption(VOICES[voice].person, pace, pitch),
                instruction=instruction(pace, pitch),
            )
            clips.append(clip)
            total += clip["duration"]
            if len(clips) % 100 == 0:
                progress(f"{len(clips)} clips, {total / 60:.1f} minutes")
    return clips


def speak_clip(
    synthesizer: Synthesizer, utterance: Utterance, folder: Path, name: str, **fields: Any
) -> dict[str, Any]:
    """Speaks an utterance into the WAV file `name` of the folder; its manifest line, with the times of its words."""
    speech = synthesizer.speak(utterance)
    return write_clip(
        folder,
        name,
        resample(speech.wav, speech.sample_rate, SAMPLE_RATE),
        SAMPLE_RATE,
        text=utterance.text,
        language=VOICES[utterance.voice].language,
        speaker=f"espeak-{utterance.voice}",
        **fields,
        segments=[{"start": round(w.start, 4), "end": round(w.end, 4), "text": w.text} for w in speech.words],
    )


def _recordings_of_manifests(manifests: Iterable[str | Path]) -> Iterable[tuple[Path, dict[str, Any]]]:
    for path in manifests:
        if not Path(path).is_file():
            continue
        for entry in Manifest(path):
            names = ("text", "language", "speaker", "caption", "instruction")
            fields: dict[str, Any] = {name: getattr(entry, name) for name in names}
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
            text = transcript.read_text(encoding="utf-8", errors="replace") if transcript.is_file() else ""
            yield path, {"text": " ".join(text.split())}


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    atomic_write(path, "".join(line + "\n" for line in lines).encode())
