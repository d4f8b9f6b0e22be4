"""The closed vocabulary: its words, their times, what is held out, and that it can be made again."""

from __future__ import annotations

from collections import Counter

import pytest

from mimo_jax.audio.synth import VOICES
from mimo_jax.corpora.manifest import CorpusError
from mimo_jax.corpora.words import build_words, vocabulary
from mimo_jax.data.manifest import Manifest

pytest.importorskip("espeakng_loader")

HELD_OUT = ("klatt", "m1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_words(tmp_path_factory.mktemp("words"), minutes=2.0, hold_out=HELD_OUT)


def test_vocabulary_is_closed_and_has_no_word_twice():
    words = vocabulary()
    assert len(words) == len(set(words)) == 50
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


def test_every_word_has_its_time(corpus):
    for path in corpus.manifests:
        for entry in Manifest(path):
            assert [s.text for s in entry.segments] == entry.text.split() and 3 <= len(entry.segments) <= 6
            assert set(entry.text.split()) <= set(vocabulary())
            assert all(0.05 < s.end - s.start < 1.5 for s in entry.segments)
            assert entry.segments[-1].end == pytest.approx(entry.duration, abs=2e-3)


def test_words_are_drawn_evenly(corpus):
    counts = Counter(word for entry in Manifest(corpus.train) for word in entry.text.split())
    assert len(counts) == 50 and max(counts.values()) < 5 * sum(counts.values()) / 50


def test_held_out_voices_are_in_neither_other_manifest_and_say_other_sequences(corpus):
    voices, known = list(Manifest(corpus.voices)), [*Manifest(corpus.train), *Manifest(corpus.validation)]
    assert {e.speaker for e in voices} == {f"espeak-{v}" for v in HELD_OUT}
    assert {e.speaker for e in known} == {f"espeak-{v}" for v in VOICES if v not in HELD_OUT}
    train = {e.text for e in Manifest(corpus.train)}
    assert not train & {e.text for e in [*voices, *Manifest(corpus.validation)]}
    assert len({e.text for e in voices}) == len(voices)


def test_same_arguments_give_the_same_files_and_another_seed_others(tmp_path):
    first, again, other = (
        build_words(tmp_path / name, minutes=0.1, voices=["reed", "f2"], seed=seed)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for path in first.folder.rglob("*"):
        if path.is_file():
            assert (again.folder / path.relative_to(first.folder)).read_bytes() == path.read_bytes(), path.name
    assert other.train.read_text() != first.train.read_text()


def test_unknown_voice_and_no_voice_left_are_errors_before_anything_is_spoken(tmp_path):
    with pytest.raises(CorpusError, match="speaker anna: expected one of default, f2"):
        build_words(tmp_path / "out", voices=["anna"])
    with pytest.raises(CorpusError, match="expected one of reed to be left"):
        build_words(tmp_path / "out", voices=["reed"], hold_out=["reed"])
    assert not (tmp_path / "out").exists()
