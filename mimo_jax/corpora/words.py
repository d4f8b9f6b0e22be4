"""A closed vocabulary in random order, spoken by espeak-ng: what a word probe of an audio tokenizer is measured on.

The 50 words of `vocabulary.txt` are English, one to three syllables, spelled in lower case. An utterance is a random
sequence of 3 to 6 of them, so neither a word's neighbours nor its place tells which it is; rates and pitches are drawn
for each utterance, and the voices take turns. The times of the words are the `segments` of the manifest. The folder is
that of any corpus: `audio/*.wav`, `train.jsonl`, `validation.jsonl` (other sequences, the same voices) and, if voices
are held out, `held-out-voices.jsonl`. The same arguments give the same files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimo_jax.audio.synth import VOICES, Synthesizer, Utterance
from mimo_jax.corpora.manifest import CorpusSummary, training_speakers, write_manifests
from mimo_jax.corpora.synthetic import shipped_lines, speak_clip

_NUM_WORDS = (3, 6)  # of an utterance, from and to
_RATES = (130, 210)  # words per minute, from and to
_PITCHES = (25, 75)  # of espeak-ng's 0..100
_VALIDATION_SHARE = 10  # validation gets one minute for so many of training, and so does each held-out voice


def vocabulary() -> list[str]:
    """The words."""
    return shipped_lines("vocabulary.txt")


def build_words(
    folder: str | Path,
    *,
    minutes: float = 30.0,
    voices: Sequence[str] = tuple(VOICES),
    hold_out: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> CorpusSummary:
    """Builds the corpus.

    Args:
        minutes: speech to make for training; validation and each held-out voice get a tenth of it.
        voices: keys of `VOICES` that speak.
        hold_out: those among all `VOICES` that are in `held-out-voices.jsonl` only.
        seed: of all that is drawn.

    Raises:
        SynthError: speech cannot be synthesised.
        CorpusError: a voice does not exist, or none is left.
    """
    folder, learnt = Path(folder), training_speakers(voices, hold_out, VOICES)
    few = minutes * 60.0 / _VALIDATION_SHARE
    train = _speak(folder, "t", learnt, minutes * 60.0, seed, progress)
    validation = _speak(folder, "v", learnt, few, seed, progress)
    unknown = [clip for voice in dict.fromkeys(hold_out) for clip in _speak(folder, "h", [voice], few, seed, progress)]
    return write_manifests(folder, train, validation, voices=unknown)


def _speak(
    folder: Path, side: str, voices: Sequence[str], seconds: float, seed: int, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Utterances until there is as much speech. Their words depend on side, voices and seed."""
    words, draw = vocabulary(), random.Random(f"words {side} {' '.join(voices)} {seed}")
    clips: list[dict[str, Any]] = []
    total = 0.0
    with Synthesizer() as synthesizer:
        while total < seconds:
            voice, said = voices[len(clips) % len(voices)], draw.choices(words, k=draw.randint(*_NUM_WORDS))
            style = draw.randint(*_RATES), draw.randint(*_PITCHES)
            utterance = Utterance(" ".join(said), voice, *style, seed=draw.randrange(2**31))
            clip = speak_clip(synthesizer, utterance, folder, f"audio/{side}{len(clips):05d}-{voice}.wav")
            clips.append(clip)
            total += clip["duration"]
            if len(clips) % 100 == 0:
                progress(f"{len(clips)} clips, {total / 60:.1f} minutes")
    return clips
