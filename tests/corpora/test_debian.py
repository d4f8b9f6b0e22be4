"""Manifests from Debian packages, on a small imitation of their files."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from mimo_jax.audio.files import AudioError, load_audio, save_wav
from mimo_jax.corpora.debian import asterisk_recordings, festvox_recordings, phone_labels, prepare_debian
from mimo_jax.corpora.manifest import CorpusError
from mimo_jax.data.manifest import Manifest

TRANSCRIPT = """; Core Asterisk Sounds in English

activated: Activated.
beep: [this is a simple beep tone]
silence/1: (1 second of silence)
confbridge-join: <beep ascending>
digits/ten: ten
absent: This one has no sound file.
conf-options: Press 1 to mute: or 2 to
empty:
"""


@pytest.fixture
def root(tmp_path):
    """Installed packages: English prompts and two sentences of festvox-ru."""
    doc = tmp_path / "usr/share/doc/asterisk-core-sounds-en"
    doc.mkdir(parents=True)
    (doc / "core-sounds-en.txt.gz").write_bytes(gzip.compress(("\ufeff" + TRANSCRIPT).encode()))
    sounds = tmp_path / "usr/share/asterisk/sounds/en_US_f_Allison"
    for name in ("activated", "beep", "silence/1", "digits/ten", "conf-options"):
        path = sounds / f"{name}.g722"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(np.random.default_rng(0).bytes(8000))  # G.722 has no header: any 8000 bytes are one second
    (tmp_path / "usr/share/asterisk/sounds/en").symlink_to(sounds)
    voice = tmp_path / "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
    (voice / "etc").mkdir(parents=True)
    lines = ['( ru_0001 "Она завела, прядь вол+ос." )', '( ru_0002 "Нет файла." )', "nonsense"]
    (voice / "etc/txt.done.data").write_text("\n".join(lines), encoding="utf-8")
    save_wav(voice / "wav/ru_0001.wav", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    (voice / "lab").mkdir()
    (voice / "lab/ru_0001.lab").write_text("#\n0.34200 125 pau\n0.39200 125 a\n1.50000 125 n\n")
    return tmp_path


def test_prompts_with_remarks_and_without_files_are_left_out_and_counted(root):
    skipped: list[str] = []
    found = list(asterisk_recordings(root, "en", skipped))
    assert [(r.name, r.text) for r in found] == [
        ("activated", "Activated."),
        ("digits/ten", "ten"),
        ("conf-options", "Press 1 to mute: or 2 to"),
    ]
    assert {(r.language, r.speaker, r.person) for r in found} == {("en-US", "allison", "woman")}
    assert len(skipped) == 4 and sum("absent.g722: no such sound file" in s for s in skipped) == 1


def test_stress_marks_are_not_text(root):
    skipped: list[str] = []
    assert [r.text for r in festvox_recordings(root, skipped)] == ["Она завела, прядь волос."]
    assert len(skipped) == 1 and "ru_0002.wav" in skipped[0]


def test_manifests_and_audio_of_both_packages(root, tmp_path):
    pytest.importorskip("av")
    out = prepare_debian(tmp_path / "out", root=root)
    entries = [*Manifest(out.train), *Manifest(out.validation)] if out.clips[1] else list(Manifest(out.train))
    assert {(e.speaker, e.language, e.text) for e in entries} >= {
        ("allison", "en-US", "ten"),
        ("festvox-nsh", "ru-RU", "Она завела, прядь волос."),
    }
    assert {e.caption for e in entries} == {"A woman speaks English.", "A man speaks Russian."}
    ten = next(e for e in entries if e.text == "ten")
    assert len(load_audio(ten.audio, 16_000)) == pytest.approx(16_000, abs=1)


def test_short_prompts_can_be_left_out(root, tmp_path):
    pytest.importorskip("av")
    out = prepare_debian(tmp_path / "out", root=root, min_characters=15)
    assert sum(out.clips) == 2
    assert sum("shorter than 15" in s for s in out.skipped) == 2


def test_nothing_installed_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-g722"):
        prepare_debian(tmp_path / "out", root=tmp_path, languages=["en"])
    assert not (tmp_path / "out").exists()


def test_missing_decoder_says_what_to_install_before_anything_is_written(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"pip install 'mimo-jax\[eval\]'"):
        prepare_debian(tmp_path / "out", root=root)
    assert not (tmp_path / "out").exists()


def test_a_held_out_speaker_is_on_no_other_side(root, tmp_path):
    pytest.importorskip("av")
    out = prepare_debian(tmp_path / "out", root=root, hold_out=["allison"])
    assert out.voices is not None and [e.speaker for e in Manifest(out.voices)] == ["allison"] * 3
    assert len(out.clips) == 3 and out.clips[2] == 3 and sum(out.clips[:2]) == 1
    assert "allison" not in out.train.read_text() + out.validation.read_text()
    again = prepare_debian(tmp_path / "out", root=root)  # a file of held-out voices does not outlive the holding out
    assert again.voices is None and not out.voices.exists() and len(again.manifests) == 2


def test_an_unknown_speaker_is_an_error_that_names_those_there_are(root, tmp_path):
    with pytest.raises(CorpusError, match="speaker june: expected one of allison, festvox-nsh"):
        prepare_debian(tmp_path / "out", root=root, hold_out=["june"])
    assert not (tmp_path / "out").exists()


def test_phones_are_beside_the_manifests_by_the_name_of_the_recording(root, tmp_path):
    pytest.importorskip("av")
    out = prepare_debian(tmp_path / "out", root=root, languages=[])
    phones = list(Manifest(out.folder / "phones.jsonl"))
    assert [p.audio for p in phones] == [e.audio for m in out.manifests if m.stat().st_size for e in Manifest(m)]
    times = [(s.start, s.end, s.text) for s in phones[0].segments]
    assert times == [(0.0, 0.342, "pau"), (0.342, 0.392, "a"), (0.392, 1.0, "n")]  # none lasts longer than the clip


def test_a_wrong_label_file_is_named_with_its_line(tmp_path):
    path = Path(tmp_path / "x.lab")
    path.write_text("separator ;\n#\n0.5 125 a\n0.4 125 b\n")
    with pytest.raises(CorpusError, match=r"x.lab:4: expected a time not before 0.5, got 0.4"):
        phone_labels(path, 2.0)
    path.write_text("#\n0.5 a\n")
    with pytest.raises(CorpusError, match=r"x.lab:2: expected END_SECONDS COLOUR PHONE, got '0.5 a'"):
        phone_labels(path, 2.0)
