"""The quickstart's corpus: what is held out, what captions claim, what happens to the user's own recordings."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mimo_jax.audio.files import AudioError, load_audio, save_wav
from mimo_jax.corpora import synthetic
from mimo_jax.corpora.manifest import CorpusError
from mimo_jax.corpora.synthetic import build_corpus, caption, instruction, shipped_lines
from mimo_jax.data.manifest import Manifest

pytest.importorskip("espeakng_loader")

SENTENCES = shipped_lines("sentences.txt")


def test_sentences_are_natural_in_number_and_length_and_never_repeat():
    spoken, texts = SENTENCES, shipped_lines("texts.txt")
    assert len(spoken) >= 450 and len(texts) >= 150
    assert all(8 <= len(s.split()) <= 16 and s[0].isupper() and s[-1] in ".?" for s in spoken)
    assert all(2 <= t.count(".") + t.count("?") <= 5 for t in texts)
    assert len(set(spoken)) == len(spoken) and len(set(texts)) == len(texts)
    assert not set(spoken) & {s.strip() + "." for t in texts for s in t.split(".")}
    assert all(s.isascii() for s in (*spoken, *texts))


def test_captions_and_instructions_say_the_style_and_nothing_else():
    assert caption("woman", "quickly", "high") == "A woman speaks quickly in a high voice."
    assert caption("man", "", "") == "A man speaks."
    assert instruction("slowly", "low") == "Speak slowly in a low voice."
    assert instruction("", "") == "Speak in your normal voice."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    summary = build_corpus(folder, sentences=SENTENCES[:20], minutes=1.3, validation_sentences=5)
    return summary


def test_held_out_sentences_occur_nowhere_in_training(corpus):
    train = " ".join(e.text for e in Manifest(corpus.train))
    documents = (corpus.folder / "train.txt").read_text()
    held_out = (corpus.folder / "validation.txt").read_text().splitlines()
    spoken = [s for e in Manifest(corpus.validation) for s in SENTENCES if s in e.text]
    assert len(spoken) == 5
    assert set(spoken) < set(held_out)
    for sentence in held_out:
        assert sentence not in train and sentence not in documents


def test_amount_of_speech_is_as_asked_and_all_voices_speak(corpus):
    entries = list(Manifest(corpus.train))
    assert 78.0 <= sum(e.duration for e in entries) < 90.0
    assert {e.speaker for e in entries} == {f"espeak-{v}" for v in synthetic.QUICKSTART_VOICES}
    assert corpus.clips == (len(entries), len(Manifest(corpus.validation)))
    assert any(e.text.count(".") == 2 for e in entries), "no clip of two sentences, so nothing to interleave"
    assert {e.instruction for e in entries} != {"Speak in your normal voice."}


def test_second_pass_over_the_sentences_uses_other_voices(corpus):
    speakers: dict[str, list[str]] = {}
    for entry in Manifest(corpus.train):
        speakers.setdefault(entry.text, []).append(entry.speaker)
    again = [v for v in speakers.values() if len(v) > 1]
    assert again and all(len(set(v)) == len(v) for v in again)


def test_clips_are_24_khz_equally_loud_and_timed(corpus):
    for entry in Manifest(corpus.validation):
        wav = load_audio(entry.audio, 24_000)
        assert len(wav) / 24_000 == pytest.approx(entry.duration, abs=1e-3)
        assert 20 * np.log10(np.sqrt(np.mean(wav**2))) == pytest.approx(-23, abs=1.5)
        assert " ".join(s.text for s in entry.segments) == entry.text
        assert entry.segments[-1].end == pytest.approx(entry.duration, abs=2e-3)


def test_same_arguments_give_the_same_files(corpus, tmp_path):
    again = build_corpus(tmp_path, sentences=SENTENCES[:20], minutes=1.3, validation_sentences=5)
    for path in corpus.folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(corpus.folder)).read_bytes() == path.read_bytes(), path.name
    assert again.seconds == corpus.seconds


def test_recordings_join_and_broken_ones_are_named(tmp_path):
    user, noise = tmp_path / "mine", np.random.default_rng(0).normal(0, 0.1, 16_000)
    for i in range(10):
        save_wav(user / "deep" / f"r{i}.wav", noise, 16_000)
    (user / "deep" / "r0.txt").write_text("Hello  there.\n")
    (user / "broken.flac").write_bytes(b"not audio")
    (user / "notes.md").write_text("no recording")
    recorded = tmp_path / "recorded.jsonl"
    lines = [{"audio": f"mine/deep/r{i}.wav", "text": f"Number {i}.", "speaker": "anna"} for i in range(5)]
    recorded.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = build_corpus(
        tmp_path / "out",
        sentences=["A first short sentence is enough for this.", "A second short sentence is enough as well."],
        minutes=0.01,
        validation_sentences=1,
        recorded=[recorded, tmp_path / "absent.jsonl"],
        audio=[user],
    )
    train, held_out = list(Manifest(out.train)), list(Manifest(out.validation))
    assert [e.speaker for e in train[1:5]] == ["anna"] * 4
    assert [e.text for e in held_out[1:]] == ["Number 4.", ""]
    assert train[5].text == "Hello there." and len(train) == 1 + 4 + 9
    assert len(out.skipped) == 1 and "broken.flac" in out.skipped[0]
    assert all(len(load_audio(e.audio, 24_000)) == 24_000 for e in train[1:])


def test_folder_without_recordings_is_an_error_that_names_it(tmp_path):
    with pytest.raises(AudioError, match="nothing-here"):
        build_corpus(tmp_path / "out", minutes=0.01, validation_sentences=1, audio=[tmp_path / "nothing-here"])


def test_holding_out_everything_is_refused_before_anything_is_spoken(tmp_path):
    with pytest.raises(ValueError, match=r"validation_sentences: expected 1\.\.1, got 2"):
        build_corpus(tmp_path, sentences=["One sentence.", "Another one."], validation_sentences=2)
    assert not list(tmp_path.iterdir())


def test_held_out_voices_speak_held_out_sentences_only(tmp_path):
    given = {"sentences": SENTENCES[:6], "minutes": 0.3, "validation_sentences": 2}
    out = build_corpus(tmp_path, **given, hold_out=["klatt", "reed"])
    assert out.voices is not None
    voices = list(Manifest(out.voices))
    assert {e.speaker for e in voices} == {"espeak-klatt", "espeak-reed"}
    known = [*Manifest(out.train), *Manifest(out.validation)]
    assert not {e.speaker for e in known} & {e.speaker for e in voices}
    learnt = " ".join(e.text for e in Manifest(out.train))
    assert not [e.text for e in voices if e.text in learnt]
    with pytest.raises(CorpusError, match="speaker june: expected one of default, f2"):
        build_corpus(tmp_path, **given, hold_out=["june"])
