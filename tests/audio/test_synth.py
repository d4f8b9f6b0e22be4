"""espeak-ng in its own process: equal samples for equal requests, truthful rate and pitch, words in time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mimo_jax.audio import synth
from mimo_jax.audio.synth import VOICES, SynthError, Synthesizer, Utterance

pytest.importorskip("espeakng_loader")

TEXT = "The baker's cat did not care for well-known fish at 7 o'clock; it was out of the ordinary."


def median_f0(wav: np.ndarray, sample_rate: int) -> float:
    """Median fundamental frequency of the voiced 40 ms frames, by autocorrelation."""
    size, found = sample_rate // 25, []
    for start in range(0, len(wav) - size, size // 2):
        frame = wav[start : start + size] - wav[start : start + size].mean()
        correlation = np.correlate(frame, frame, "full")[size - 1 :]
        shortest, longest = sample_rate // 400, sample_rate // 60
        lag = shortest + int(correlation[shortest:longest].argmax())
        if correlation[0] > 1e-3 * size and correlation[lag] > 0.6 * correlation[0]:
            found.append(sample_rate / lag)
    return float(np.median(found))


@pytest.fixture(scope="module")
def synthesizer():
    with Synthesizer() as process:
        yield process


def test_equal_utterances_give_equal_samples_whatever_was_spoken_before(synthesizer):
    requests = [Utterance(TEXT, voice, rate=165, pitch=50, seed=3) for voice in VOICES]
    forwards = [synthesizer.speak(r) for r in requests]
    with Synthesizer() as other:
        backwards = [other.speak(r) for r in reversed(requests)][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(a.wav, b.wav)
        assert a.words == b.words
    assert len({a.wav.tobytes() for a in forwards}) == len(VOICES), "two voices sound the same"


def test_words_cover_the_text_and_the_time(synthesizer):
    for text in (TEXT, "One.", "A dog, a cat, and 3 mice (in 2 boxes) ran off!", "Ça va très bien ici."):
        speech = synthesizer.speak(Utterance(text))
        assert " ".join(w.text for w in speech.words) == text
        assert speech.words[0].start == 0.0
        assert speech.words[-1].end == pytest.approx(len(speech.wav) / speech.sample_rate)
        for before, after in zip(speech.words, speech.words[1:], strict=False):
            assert before.start < before.end == after.start
        assert all("\u00a0" not in w.text for w in speech.words)


def test_silence_of_a_pause_lies_where_the_word_times_say(synthesizer):
    # The comma makes a pause at the end of "stop,"; the words around it are loud.
    speech = synthesizer.speak(Utterance("Now stop, please wait here."))
    energy = {
        w.text: float(np.mean(speech.wav[int(w.start * 22050) : int(w.end * 22050)][-1500:] ** 2)) for w in speech.words
    }
    assert energy["stop,"] < 0.01 * energy["Now"]


@pytest.mark.parametrize("voice", list(VOICES))
def test_pitch_and_rate_do_what_captions_say(synthesizer, voice):
    low, normal, high = (synthesizer.speak(Utterance(TEXT, voice, pitch=p)) for p in (25, 50, 80))
    pitches = [median_f0(s.wav, s.sample_rate) for s in (low, normal, high)]
    assert pitches[0] < 0.9 * pitches[1] < 0.8 * pitches[2]
    assert (pitches[1] > 150) == (VOICES[voice].person == "woman")
    slow, fast = (synthesizer.speak(Utterance(TEXT, voice, rate=r)) for r in (130, 210))
    assert len(slow.wav) > 1.15 * len(normal.wav) > 1.25 * len(fast.wav)


def test_speech_is_finite_and_not_silent(synthesizer):
    for voice in VOICES:
        wav = synthesizer.speak(Utterance(TEXT, voice)).wav
        assert wav.dtype == np.float32
        assert np.abs(wav).max() <= 1.0
        assert np.sqrt(np.mean(wav**2)) > 0.01


def test_bad_requests_are_named_and_leave_the_process_usable(synthesizer):
    with pytest.raises(SynthError, match="unknown voice 'nobody'"):
        synthesizer.speak(Utterance(TEXT, "nobody"))
    with pytest.raises(SynthError, match="empty"):
        synthesizer.speak(Utterance(" \n"))
    assert len(synthesizer.speak(Utterance("Still here.")).wav) > 0


def test_library_without_the_voice_is_reported(synthesizer, monkeypatch):
    monkeypatch.setitem(synth.VOICES, "ghost", synth.Voice("ghost", "xx-none", "man"))
    with pytest.raises(SynthError, match="no voice 'xx-none'"):
        synthesizer.speak(Utterance(TEXT, "ghost"))


def test_death_of_the_process_is_an_error_with_its_status():
    with Synthesizer() as process:
        process._process.kill()
        process._process.wait()
        with pytest.raises(SynthError, match="ended"):
            process.speak(Utterance("Hello there."))


def test_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setattr(synth.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SynthError, match=r"pip install 'mimo-jax\[synth\]'"):
        Synthesizer()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of loaded libraries")
def test_gpl_library_stays_out_of_this_process(synthesizer):
    synthesizer.speak(Utterance("Hello."))
    assert "espeak" not in Path("/proc/self/maps").read_text()
