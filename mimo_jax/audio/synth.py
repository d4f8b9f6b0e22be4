"""Synthetic speech from espeak-ng, with word times: the speech of the quickstart and of the tests.

Needs the optional extra `synth` (`pip install 'mimo-jax[synth]'`). The GPL library is loaded by a process of its own
(`espeak_worker.py`); this module only talks to it. Equal utterances give equal samples, in any order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self, cast

import numpy as np


class SynthError(RuntimeError):
    """Speech could not be synthesised. The message says why, and what to install when something is missing."""


@dataclass(frozen=True)
class Voice:
    """A speaker: an espeak-ng voice and the word that describes who is heard."""

    name: str  # speaker label
    espeak: str  # espeak-ng's name of it, `language` or `language+variant`
    person: str  # "man" or "woman", as it sounds
    language: str = "en"  # BCP 47


# Voices that a speech recogniser understands. espeak-ng's own default voice is male.
VOICES: dict[str, Voice] = {
    voice.name: voice
    for voice in (
        Voice("default", "en-us", "man"),
        Voice("reed", "en-us+Reed", "man"),
        Voice("klatt", "en-us+klatt4", "man"),
        Voice("m1", "en-us+m1", "man"),
        Voice("m3", "en-us+m3", "man"),
        Voice("f2", "en-us+f2", "woman"),
        Voice("f4", "en-us+f4", "woman"),
        Voice("f5", "en-us+f5", "woman"),
    )
}


@dataclass(frozen=True)
class Utterance:
    """What to say and how."""

    text: str
    voice: str = "default"  # key of `VOICES`
    rate: int = 165  # words per minute, 80 to 450
    pitch: int = 50  # 0 (low) to 100 (high); 50 is the voice's own
    seed: int = 0  # of the voice's breath and flutter


@dataclass(frozen=True)
class Word:
    """A word of the text (as whitespace separates it) and when it is spoken, in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Speech:
    """Synthesised audio; `" ".join` of the words' texts is the text, whitespace normalised."""

    wav: np.ndarray  # float32 [S] in [-1, 1]
    sample_rate: int
    words: tuple[Word, ...]


class Synthesizer:
    """The espeak-ng process, as a context manager.

    >>> with Synthesizer() as synthesizer:  # doctest: +SKIP
    ...     speech = synthesizer.speak(Utterance("Good morning."))

    Raises:
        SynthError: the extra `synth` is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("espeakng_loader") is None:
            raise SynthError("synthetic speech needs the package espeakng-loader: pip install 'mimo-jax[synth]'")
        worker = Path(__file__).with_name("espeak_worker.py")
        # -P: the worker's folder holds modules of ours and must not shadow others.
        command = [sys.executable, "-P", str(worker)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        cast(IO[bytes], self._process.stdout).close()
        with contextlib.suppress(BrokenPipeError):
            cast(IO[bytes], self._process.stdin).close()
        self._process.wait()

    def speak(self, utterance: Utterance) -> Speech:
        """Speaks one utterance; raises SynthError if the voice is unknown, the text empty, or espeak-ng fails."""
        if utterance.voice not in VOICES:
            raise SynthError(f"unknown voice {utterance.voice!r}; known are {', '.join(VOICES)}")
        text = " ".join(utterance.text.split())
        if not text:
            raise SynthError("the text to speak is empty")
        request = dataclasses.asdict(utterance) | {"text": text, "voice": VOICES[utterance.voice].espeak}
        stdin, stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            status = self._process.wait()
            raise SynthError(f"the espeak-ng process ended (exit status {status}) while speaking {text[:60]!r}")
        answer = json.loads(line)
        if "error" in answer:
            raise SynthError(f"{answer['error']}, while speaking {text[:60]!r}")
        pcm = stdout.read(2 * answer["samples"])
        if len(pcm) != 2 * answer["samples"] or not pcm:
            raise SynthError(f"espeak-ng gave no audio for {text[:60]!r}")
        wav = np.frombuffer(pcm, "<i2").astype(np.float32) / 32768.0
        return Speech(wav, answer["rate"], _words(text, answer["words"], len(wav), answer["rate"]))


def _words(text: str, events: list[list[int]], num_samples: int, sample_rate: int) -> tuple[Word, ...]:
    """Gives every word of `text` its time.

    The library announces words by its own rules: it splits some ("o'clock") and swallows others (it reads "did not"
    as one). A word begins at its first event; words without an event belong to the word before them.
    """
    tokens = text.split(" ")
    first_sample: dict[int, int] = {}
    for character, sample in events:
        first_sample.setdefault(text.count(" ", 0, max(character, 0)), sample)
    first_sample.setdefault(0, 0)
    first_sample[len(tokens)] = num_samples
    heads = sorted(first_sample)
    return tuple(
        Word(" ".join(tokens[head:until]), first_sample[head] / sample_rate, first_sample[until] / sample_rate)
        for head, until in itertools.pairwise(heads)
    )
